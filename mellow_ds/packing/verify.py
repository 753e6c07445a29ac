"""Check a shard folder whole: sizes, hashes, every sample's checksum, its JSON, that its audio decodes. Only reads."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
from tqdm import tqdm

from mellow_ds.errors import ShardError
from mellow_ds.packing.settings import CODECS, OPUS_SAMPLE_RATE
from mellow_ds.packing.shard_pool import each_shard
from mellow_ds.shard_format import (
    FEATURES_EXTENSION,
    MAX_MEMBER_BYTES,
    FeatureInfo,
    Manifest,
    SampleInfo,
    ShardInfo,
    check_shard_size,
    read_index,
    read_manifest,
    sample_checksum,
)

_MAX_PROBLEMS = 20  # of one shard that are named; a replaced tar is wrong in every sample


@dataclass(frozen=True)
class _Task:
    """One shard to check."""

    folder: Path
    manifest: Manifest  # with this shard alone: with all of them it would be sent to the processes for each

    @property
    def shard(self) -> ShardInfo:
        return self.manifest.shards[0]


@dataclass
class _Findings:
    """What was found in one shard."""

    problems: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    subtypes: Counter[str] = field(default_factory=Counter)


class DamagedSample(Exception):
    """One sample is not what the index says."""


def verify_shards(folder: str | Path, workers: int = 1, progress: bool = False) -> list[str]:
    """Everything that is wrong with a shard folder, a line each; empty where all is well.

    `workers` processes read a shard at a time each. Raises `ShardError` where the manifest itself cannot be used.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    keys: set[str] = set()
    subtypes: Counter[str] = Counter()
    num_samples = sum(shard.num_samples for shard in manifest.shards)
    tasks = [_Task(Path(folder), replace(manifest, shards=(shard,))) for shard in manifest.shards]
    with tqdm(total=num_samples, desc="verifying", unit="clip", disable=None if progress else True) as bar:
        for found in each_shard(_verify_shard, tasks, workers, bar):
            problems += found.problems
            keys |= found.keys
            subtypes += found.subtypes
    if not problems:
        problems += _compare_totals(Path(folder), manifest, len(keys), subtypes)
    return problems


def _verify_shard(task: _Task, count: Callable[[], None]) -> _Findings:
    folder, manifest, shard, found = task.folder, task.manifest, task.shard, _Findings()
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
            _verify_samples(tar, path, manifest, rows, found, count)
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
    tar: BinaryIO, path: Path, manifest: Manifest, rows: np.ndarray, found: _Findings, count: Callable[[], None]
) -> None:
    keys = {row["key"].decode("ascii", "replace") for row in rows}
    if len(keys) < len(rows):
        found.problems.append(f"{path}: the index names a clip twice")
    for row in rows:
        key = row["key"].decode("ascii", "replace")
        try:
            audio, info = read_sample(tar, row, f"{path}, clip {key}")
            _check_info(info, row, keys, manifest)
            if manifest.features is None:
                decode_member(audio, info)
            else:
                _check_features(audio, manifest.features)
        except ShardError as error:
            found.problems.append(str(error))
        except DamagedSample as fault:
            found.problems.append(f"{path}, clip {key} at byte {row['audio_offset']}: {fault}")
        else:
            found.subtypes.update(question.subtype for question in info.questions)
        count()
    found.keys |= keys


def read_sample(tar: BinaryIO, row: np.void, where: str) -> tuple[bytes, SampleInfo]:
    """(audio, JSON) of the sample of an index row, by its checksum; raises `DamagedSample`, or `ShardError`."""
    audio = read_member(tar, int(row["audio_offset"]), int(row["audio_bytes"]))
    payload = read_member(tar, int(row["json_offset"]), int(row["json_bytes"]))
    if sample_checksum(audio, payload) != int(row["checksum"]):
        raise DamagedSample("its checksum differs from the index")
    return audio, SampleInfo.from_json(payload, where)


def read_member(tar: BinaryIO, offset: int, num_bytes: int) -> bytes:
    """`num_bytes` of an open tar from `offset` on; `DamagedSample` where they are not there."""
    if num_bytes > MAX_MEMBER_BYTES:
        raise DamagedSample(f"the index says {num_bytes} bytes; a member has at most {MAX_MEMBER_BYTES}")
    try:
        tar.seek(offset)
        payload = tar.read(num_bytes)
    except (OSError, ValueError) as error:  # a bad disk, or an offset that no file can have
        raise DamagedSample(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(payload) < num_bytes:
        raise DamagedSample("the tar ends within it")
    return payload


def _check_info(info: SampleInfo, row: np.void, keys: set[str], manifest: Manifest) -> None:
    """The JSON member against index, manifest and the other clips of the shard."""
    if info.key != row["key"].decode("ascii", "replace"):
        raise DamagedSample(f"its JSON is that of clip {info.key}")
    if (info.num_frames, len(info.questions)) != (row["num_frames"], row["num_questions"]):
        raise DamagedSample("its JSON and the index differ in frames or questions")
    if info.sample_rate != manifest.sample_rate:
        raise DamagedSample(f"its JSON says {info.sample_rate} Hz; the manifest {manifest.sample_rate}")
    for question in info.questions:
        if question.clips[:1] != (info.key,):
            raise DamagedSample(f"question {question.id} stands with a clip that is not its first")
        for other in question.clips:
            if other not in keys:
                raise DamagedSample(f"question {question.id} needs clip {other}, which is not in this shard")


def _check_features(payload: bytes, features: FeatureInfo) -> None:
    """Whole crops of finite numbers."""
    num_crops, rest = divmod(len(payload), features.crop_bytes)
    if rest or not 1 <= num_crops <= features.max_crops:
        raise DamagedSample(
            f"its {len(payload)} bytes of features are not 1 to {features.max_crops} crops of {features.crop_bytes}"
        )
    if not np.isfinite(np.frombuffer(payload, dtype="<f2")).all():
        raise DamagedSample("its features are not finite")


def decode_member(audio: bytes, info: SampleInfo) -> np.ndarray:
    """[frames] int16, the whole clip at its stored rate; `DamagedSample` where it is not what `info` says."""
    try:
        with soundfile.SoundFile(io.BytesIO(audio)) as sound:
            # Opus is stored at a rate of its own; its frames in the index are those at the manifest's rate
            rate = OPUS_SAMPLE_RATE if sound.subtype == "OPUS" else info.sample_rate
            num_frames = -(-sound.frames * info.sample_rate // rate)
            if (sound.channels, sound.samplerate, num_frames) != (1, rate, info.num_frames):
                raise DamagedSample(
                    f"its audio has {sound.channels} channels, {sound.samplerate} Hz, {sound.frames} frames; "
                    f"wanted are 1, {rate}, {info.num_frames} frames at {info.sample_rate} Hz"
                )
            samples = sound.read(dtype="int16")
            wanted = sound.frames
    except (RuntimeError, TypeError, ValueError) as error:
        raise DamagedSample(
            f"its audio cannot be decoded ({getattr(error, 'error_string', type(error).__name__)})"
        ) from None
    if len(samples) != wanted:
        raise DamagedSample(f"its audio gives {len(samples)} frames; wanted are {wanted}")
    return samples


def _compare_members(path: Path, manifest: Manifest, rows: np.ndarray) -> Iterator[str]:
    """Whether a plain tar reader sees the members that the index names, in its order, and nothing else."""
    extension = FEATURES_EXTENSION if manifest.features else CODECS.get(manifest.codec, manifest.codec)
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
