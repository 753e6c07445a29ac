"""Check a shard folder whole: sizes, hashes, every sample's checksum, its JSON, that its audio decodes. Only reads."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from tqdm import tqdm

from mellow_ds.errors import ShardError
from mellow_ds.packing.settings import CODECS
from mellow_ds.shard_format import (
    MAX_MEMBER_BYTES,
    Manifest,
    SampleInfo,
    ShardInfo,
    check_shard_size,
    read_index,
    read_manifest,
    sample_checksum,
)

_MAX_PROBLEMS = 20  # of one shard that are named; a replaced tar is wrong in every sample


@dataclass
class _Findings:
    """What was found in one shard."""

    problems: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    subtypes: Counter[str] = field(default_factory=Counter)


class _Damaged(Exception):
    """One sample is not what the index says."""


def verify_shards(folder: str | Path, workers: int = 1, progress: bool = False) -> list[str]:
    """Everything that is wrong with a shard folder, a line each; empty where all is well.

    `workers` shards are read at once. Raises `ShardError` where the manifest itself cannot be used.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    keys: set[str] = set()
    subtypes: Counter[str] = Counter()
    num_samples = sum(shard.num_samples for shard in manifest.shards)
    with (
        ThreadPoolExecutor(max(workers, 1)) as threads,
        tqdm(total=num_samples, desc="verifying", unit="clip", disable=None if progress else True) as bar,
    ):
        for found in threads.map(lambda shard: _verify_shard(Path(folder), manifest, shard, bar), manifest.shards):
            problems += found.problems
            keys |= found.keys
            subtypes += found.subtypes
    if not problems:
        problems += _compare_totals(Path(folder), manifest, len(keys), subtypes)
    return problems


def _verify_shard(folder: Path, manifest: Manifest, shard: ShardInfo, bar: Any) -> _Findings:
    found = _Findings()
    path = folder / shard.name
    try:
        rows = read_index(folder, shard)
    except (ShardError, ValueError, OSError, EOFError) as error:
        found.problems.append(str(error))
        rows = None
    try:
        check_shard_size(folder, shard)
    except ShardError as error:
        found.problems.append(str(error))
    if not path.is_file():
        return found
    with path.open("rb") as tar:
        if _sha256(tar) != shard.sha256:
            found.problems.append(f"{path} is not the file that the manifest names (SHA-256 differs)")
        if rows is not None:
            _verify_samples(tar, path, manifest, rows, found, bar)
            found.problems += _compare_members(path, manifest, rows)
    if rows is not None and int(rows["num_questions"].sum()) != shard.num_questions:
        found.problems.append(f"{path}: the index counts other questions than the manifest ({shard.num_questions})")
    if len(found.problems) > _MAX_PROBLEMS:
        more = len(found.problems) - _MAX_PROBLEMS
        found.problems[_MAX_PROBLEMS:] = [f"{path}: {more} more problems"]
    return found


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _verify_samples(
    tar: BinaryIO, path: Path, manifest: Manifest, rows: np.ndarray, found: _Findings, bar: Any
) -> None:
    keys = {row["key"].decode("ascii", "replace") for row in rows}
    if len(keys) < len(rows):
        found.problems.append(f"{path}: the index names a clip twice")
    for row in rows:
        key = row["key"].decode("ascii", "replace")
        try:
            audio = _read_member(tar, int(row["audio_offset"]), int(row["audio_bytes"]))
            payload = _read_member(tar, int(row["json_offset"]), int(row["json_bytes"]))
            if sample_checksum(audio, payload) != int(row["checksum"]):
                raise _Damaged("its checksum differs from the index")
            info = SampleInfo.from_json(payload, f"{path}, clip {key}")
            _check_info(info, row, keys, manifest)
            _check_audio(audio, info)
        except ShardError as error:
            found.problems.append(str(error))
        except _Damaged as fault:
            found.problems.append(f"{path}, clip {key} at byte {row['audio_offset']}: {fault}")
        else:
            found.subtypes.update(question.subtype for question in info.questions)
        bar.update()
    found.keys |= keys


def _read_member(tar: BinaryIO, offset: int, num_bytes: int) -> bytes:
    if num_bytes > MAX_MEMBER_BYTES:
        raise _Damaged(f"the index says {num_bytes} bytes; a member has at most {MAX_MEMBER_BYTES}")
    try:
        tar.seek(offset)
        payload = tar.read(num_bytes)
    except OSError as error:  # an offset that no file can have, or a bad disk
        raise _Damaged(f"it cannot be read ({error.strerror})") from None
    if len(payload) < num_bytes:
        raise _Damaged("the tar ends within it")
    return payload


def _check_info(info: SampleInfo, row: np.void, keys: set[str], manifest: Manifest) -> None:
    """The JSON member against index, manifest and the other clips of the shard."""
    if info.key != row["key"].decode("ascii", "replace"):
        raise _Damaged(f"its JSON is that of clip {info.key}")
    if (info.num_frames, len(info.questions)) != (row["num_frames"], row["num_questions"]):
        raise _Damaged("its JSON and the index differ in frames or questions")
    if info.sample_rate != manifest.sample_rate:
        raise _Damaged(f"its JSON says {info.sample_rate} Hz; the manifest {manifest.sample_rate}")
    for question in info.questions:
        if question.clips[:1] != (info.key,):
            raise _Damaged(f"question {question.id} stands with a clip that is not its first")
        for other in question.clips:
            if other not in keys:
                raise _Damaged(f"question {question.id} needs clip {other}, which is not in this shard")


def _check_audio(audio: bytes, info: SampleInfo) -> None:
    try:
        with soundfile.SoundFile(io.BytesIO(audio)) as sound:
            if (sound.channels, sound.samplerate, sound.frames) != (1, info.sample_rate, info.num_frames):
                raise _Damaged(
                    f"its audio has {sound.channels} channels, {sound.samplerate} Hz, {sound.frames} frames; "
                    f"wanted are 1, {info.sample_rate}, {info.num_frames}"
                )
            num_frames = len(sound.read(dtype="int16"))
    except (RuntimeError, TypeError, ValueError) as error:
        raise _Damaged(
            f"its audio cannot be decoded ({getattr(error, 'error_string', type(error).__name__)})"
        ) from None
    if num_frames != info.num_frames:
        raise _Damaged(f"its audio gives {num_frames} frames; wanted are {info.num_frames}")


def _compare_members(path: Path, manifest: Manifest, rows: np.ndarray) -> Iterator[str]:
    """Whether a plain tar reader sees the members that the index names, in its order, and nothing else."""
    extension = CODECS.get(manifest.codec, manifest.codec)
    wanted = []
    for row in rows:
        key = row["key"].decode("ascii", "replace")
        wanted.append((f"{key}.{extension}", int(row["audio_offset"]), int(row["audio_bytes"])))
        wanted.append((f"{key}.json", int(row["json_offset"]), int(row["json_bytes"])))
    try:
        with tarfile.open(path, "r:") as tar:
            found = [(member.name, member.offset_data, member.size) for member in tar]
    except (tarfile.TarError, OSError, EOFError) as error:
        yield f"{path} cannot be read as a tar ({error})"
        return
    if found != wanted:
        place = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), None)
        name = found[place][0] if place is not None else f"its end, after {len(found)} members of {len(wanted)}"
        yield f"{path}: as a tar it differs from the index at {name}"


def _compare_totals(folder: Path, manifest: Manifest, num_clips: int, subtypes: Counter[str]) -> list[str]:
    found = {
        "clips": (num_clips, manifest.num_clips),
        "questions": (subtypes.total(), manifest.num_questions),
        "questions by subtype": (dict(sorted(subtypes.items())), dict(sorted(manifest.subtypes.items()))),
    }
    return [
        f"{folder}: the shards hold {here} {name}; the manifest says {said}"
        for name, (here, said) in found.items()
        if here != said
    ]
