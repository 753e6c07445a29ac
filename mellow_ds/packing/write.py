"""Write one shard: decode its clips, drop the questions of bad ones, write tar, index and a note that it is done.

Runs in a worker process. Everything is written under a temporary name, synced, then renamed; the note comes last, so a
shard with a note is whole. The note holds a fingerprint of what went in: a restarted build reuses a shard only for the
same clips, questions and settings.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mellow_ds.packing.decode import BadClip, pack_clip, read_source
from mellow_ds.packing.settings import CODECS
from mellow_ds.packing.shard_file import published, write_samples
from mellow_ds.packing.shard_plan import PlannedClip, ShardPlan
from mellow_ds.packing.survey import content_key, source_checksum
from mellow_ds.shard_format import Question, SampleInfo, ShardInfo


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
        samples = _kept_samples(plan, kept, packed, spool)
        info = write_samples(folder, plan.name, CODECS[plan.form.codec], samples, len(kept)) if kept else None
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
            if not _is_same(payload, clip):
                raise BadClip("changed while it was packed", "start the build again")
            audio, num_frames = pack_clip(payload, plan.form.sample_rate, plan.form.codec)
        except BadClip as fault:
            bad[clip.key] = fault
        else:
            packed[clip.key] = _Packed(spool.tell(), len(audio), num_frames)
            spool.write(audio)
        on_clip()
    return packed, bad


def _is_same(payload: bytes, clip: PlannedClip) -> bool:
    return source_checksum(payload) == clip.checksum if clip.checksum else content_key(payload) == clip.key


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


def _kept_samples(
    plan: ShardPlan, kept: dict[str, tuple[Question, ...]], packed: dict[str, _Packed], spool: IO[bytes]
) -> Iterator[tuple[SampleInfo, bytes]]:
    for clip in plan.clips:
        if clip.key not in kept:
            continue
        place = packed[clip.key]
        spool.seek(place.offset)
        info = SampleInfo(clip.key, clip.source, plan.form.sample_rate, place.num_frames, kept[clip.key])
        yield info, spool.read(place.num_bytes)
