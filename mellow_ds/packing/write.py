"""Write one shard: decode its clips, drop the questions of bad ones, write tar, index and a note that it is done.

Runs in a worker process. Everything is written under a temporary name, synced, then renamed; the note comes last, so a
shard with a note is whole. The note holds a fingerprint of what went in: a restarted build reuses a shard only for the
same clips, questions and settings.
"""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from mellow_ds.packing.decode import BadClip, pack_clip, read_source
from mellow_ds.packing.settings import CODECS
from mellow_ds.packing.shard_plan import ShardPlan
from mellow_ds.packing.survey import content_key
from mellow_ds.shard_format import INDEX_DTYPE, Question, SampleInfo, ShardInfo, index_name, sample_checksum

_OWNER = "mellow"  # fixed, like times and modes: the same input gives the same bytes


@dataclass(frozen=True)
class DroppedQuestion:
    """A question that is left out because one of its clips turned out bad when it was decoded."""

    id: str
    key: str  # of the bad clip
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardNote:
    """What came out: the done-note beside a shard."""

    fingerprint: str
    info: ShardInfo | None  # None where every question was dropped and no tar was written
    keys: tuple[str, ...]
    dropped: tuple[DroppedQuestion, ...]

    def to_json(self) -> str:
        """JSON text; `read_note` is the inverse."""
        return json.dumps(dataclasses.asdict(self))


def note_path(folder: Path, shard_name: str) -> Path:
    """Where the note of a shard lies."""
    return folder / f"{shard_name.removesuffix('.tar')}.done.json"


def read_note(folder: Path, shard_name: str) -> ShardNote | None:
    """The note of a shard, or None where there is none that can be read."""
    try:
        content = json.loads(note_path(folder, shard_name).read_text(encoding="utf-8"))
        info = ShardInfo(**content["info"]) if content["info"] is not None else None
        dropped = tuple(DroppedQuestion(**question) for question in content["dropped"])
        return ShardNote(content["fingerprint"], info, tuple(content["keys"]), dropped)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_shard(
    plan: ShardPlan, fingerprint: str, audio_root: Path, folder: Path, on_clip: Callable[[], None]
) -> ShardNote:
    """Write tar, index and note into `folder`; `on_clip` is called after each clip. `OSError` where writing fails."""
    with tempfile.TemporaryFile(dir=folder) as spool:
        packed, bad = _pack_clips(plan, audio_root, spool, on_clip)
        kept, dropped = _drop_questions(plan, bad)
        info = _write_files(plan, kept, packed, spool, folder) if kept else None
    note = ShardNote(fingerprint, info, tuple(sorted(kept)), dropped)
    with published(note_path(folder, plan.name)) as file:
        file.write(note.to_json().encode())
    return note


@dataclass(frozen=True)
class _Packed:
    """Where the encoded clip lies in the spool."""

    offset: int
    num_bytes: int
    num_frames: int


def _pack_clips(
    plan: ShardPlan, audio_root: Path, spool: IO[bytes], on_clip: Callable[[], None]
) -> tuple[dict[str, _Packed], dict[str, BadClip]]:
    """Encode all clips into the spool first: whether a question stays depends on clips that come later."""
    packed, bad = {}, {}
    for clip in plan.clips:
        try:
            payload = read_source(audio_root / clip.source)
            if content_key(payload) != clip.key:
                raise BadClip("changed while it was packed", "start the build again")
            audio, num_frames = pack_clip(payload, plan.form.sample_rate, plan.form.codec)
        except BadClip as fault:
            bad[clip.key] = fault
        else:
            packed[clip.key] = _Packed(spool.tell(), len(audio), num_frames)
            spool.write(audio)
        on_clip()
    return packed, bad


def _drop_questions(
    plan: ShardPlan, bad: dict[str, BadClip]
) -> tuple[dict[str, tuple[Question, ...]], tuple[DroppedQuestion, ...]]:
    """(clips that are still asked about, each with its questions; questions with a bad clip)."""
    staying: dict[str, list[Question]] = {}
    dropped = []
    for clip in plan.clips:
        for question in clip.questions:
            bad_key = next((key for key in question.clips if key in bad), None)
            if bad_key is not None:
                fault = bad[bad_key]
                dropped.append(DroppedQuestion(question.id, bad_key, fault.reason, fault.detail))
                continue
            for key in question.clips:
                staying.setdefault(key, [])
            staying[clip.key].append(question)
    return {key: tuple(questions) for key, questions in staying.items()}, tuple(dropped)


def _write_files(
    plan: ShardPlan,
    kept: dict[str, tuple[Question, ...]],
    packed: dict[str, _Packed],
    spool: IO[bytes],
    folder: Path,
) -> ShardInfo:
    rows = np.zeros(len(kept), dtype=INDEX_DTYPE)
    with published(folder / plan.name) as file:
        hashing = _HashingFile(file)
        _write_members(plan, kept, packed, spool, hashing, rows)
        file.flush()
        _fill_offsets(rows, Path(file.name), CODECS[plan.form.codec])
    index = io.BytesIO()
    np.save(index, rows, allow_pickle=False)
    with published(folder / index_name(plan.name)) as file:
        file.write(index.getvalue())
    return ShardInfo(
        name=plan.name,
        num_bytes=hashing.num_bytes,
        sha256=hashing.digest.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        num_samples=len(rows),
        num_questions=int(rows["num_questions"].sum()),
    )


def _write_members(
    plan: ShardPlan,
    kept: dict[str, tuple[Question, ...]],
    packed: dict[str, _Packed],
    spool: IO[bytes],
    file: "_HashingFile",
    rows: np.ndarray,
) -> None:
    """KEY.flac and KEY.json for each kept clip; fills all of `rows` but the offsets."""
    from webdataset import TarWriter  # imports torch

    clips = [clip for clip in plan.clips if clip.key in kept]
    with TarWriter(file, user=_OWNER, group=_OWNER, mode=0o644, mtime=0, encoder=False) as tar:
        for row, clip in zip(rows, clips, strict=True):
            place, questions = packed[clip.key], kept[clip.key]
            spool.seek(place.offset)
            audio = spool.read(place.num_bytes)
            info = SampleInfo(clip.key, clip.source, plan.form.sample_rate, place.num_frames, questions).to_json()
            # one call a member: TarWriter sorts the members of a call, and .json would come before .wav
            tar.write({"__key__": clip.key, CODECS[plan.form.codec]: audio})
            tar.write({"__key__": clip.key, "json": info})
            row["key"] = clip.key.encode()
            row["audio_bytes"], row["json_bytes"] = len(audio), len(info)
            row["checksum"] = sample_checksum(audio, info)
            row["num_frames"], row["num_questions"] = place.num_frames, len(questions)


def _fill_offsets(rows: np.ndarray, tar_path: Path, extension: str) -> None:
    """Read back from the tar where the payloads are."""
    with tarfile.open(tar_path, "r:") as tar:
        for row in rows:
            key = row["key"].decode()
            for name, size, field in (
                (f"{key}.{extension}", row["audio_bytes"], "audio_offset"),
                (f"{key}.json", row["json_bytes"], "json_offset"),
            ):
                member = tar.next()
                assert member is not None, f"{tar_path} ends before {name}"
                assert (member.name, member.size) == (name, size), f"{tar_path} holds {member.name} in place of {name}"
                row[field] = member.offset_data


class _HashingFile:
    """Passes writes on and keeps their hash and number."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` whole and synced, or not at all."""
    # the process id keeps apart a worker of a killed build that has not yet noticed
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
