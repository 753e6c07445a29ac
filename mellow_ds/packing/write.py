"""Write one shard: decode its clips, drop the questions of bad ones, write tar, index and a note that it is done.

Runs in a worker process. Everything is written under a temporary name, synced, then renamed; the note comes last, so a
shard with a note is whole. The note holds a fingerprint of what went in: a restarted build reuses a shard only for the
same clips, questions and settings. In memory are the questions of one clip at a time.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO

from mellow_ds.packing.decode import BadClip, pack_clip, read_source
from mellow_ds.packing.question_file import StoredQuestion, read_questions
from mellow_ds.packing.settings import CODECS
from mellow_ds.packing.shard_file import published, write_samples
from mellow_ds.packing.shard_plan import PlannedClip, ShardPlan
from mellow_ds.packing.survey import content_key, source_checksum
from mellow_ds.shard_format import SampleInfo, ShardInfo


@dataclass(frozen=True)
class ShardNote:
    """What came out: the done-note beside a shard."""

    fingerprint: str
    info: ShardInfo | None  # None where every question was dropped and no tar was written
    bad: dict[str, tuple[str, str]] = field(default_factory=dict)  # key: (reason, detail) of clips that turned out bad

    def to_json(self) -> str:
        """JSON text; `read_note` is the inverse."""
        return json.dumps(dataclasses.asdict(self))


def bad_place(question: StoredQuestion, bad: Collection[str]) -> int | None:
    """Which of the clips of a question is the first that is among the `bad` keys; None: none is."""
    return next((place for place, key in enumerate(question.clips) if key in bad), None) if bad else None


def note_path(folder: Path, shard_name: str) -> Path:
    """Where the note of a shard lies."""
    return folder / f"{shard_name.removesuffix('.tar')}.done.json"


def read_note(folder: Path, shard_name: str) -> ShardNote | None:
    """The note of a shard, or None where there is none that can be read."""
    try:
        content = json.loads(note_path(folder, shard_name).read_text(encoding="utf-8"))
        info = ShardInfo(**content["info"]) if content["info"] is not None else None
        bad = {key: (str(reason), str(detail)) for key, (reason, detail) in content["bad"].items()}
        return ShardNote(content["fingerprint"], info, bad)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_shard(
    plan: ShardPlan, versions: str, question_file: Path, audio_root: Path, folder: Path, on_clip: Callable[[], None]
) -> ShardNote:
    """Write tar, index and note into `folder`; `on_clip` is called after each clip. `OSError` where writing fails."""
    with question_file.open("rb", buffering=0) as questions, tempfile.TemporaryFile(dir=folder) as spool:
        packed, bad = _pack_clips(plan, audio_root, spool, on_clip)
        faults = {key: (fault.reason, fault.detail) for key, fault in bad.items()}
        kept: set[str] = set()  # clips that are still asked about

        def keep(question: StoredQuestion) -> None:
            if bad_place(question, faults) is None:
                kept.update(question.clips)

        note = ShardNote(plan.fingerprint(versions, questions, keep), None, faults)
        if kept:
            samples = _kept_samples(plan, questions, note, kept, packed, spool)
            info = write_samples(folder, plan.name, CODECS[plan.form.codec], samples, len(kept))
            note = dataclasses.replace(note, info=info)
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


def _kept_samples(
    plan: ShardPlan,
    questions: BinaryIO,
    note: ShardNote,
    kept: set[str],
    packed: dict[str, _Packed],
    spool: IO[bytes],
) -> Iterator[tuple[SampleInfo, bytes]]:
    for clip in plan.clips:
        if clip.key not in kept:
            continue
        own = tuple(
            question.question
            for question in read_questions(questions, clip.questions)
            if bad_place(question, note.bad) is None
        )
        place = packed[clip.key]
        spool.seek(place.offset)
        info = SampleInfo(clip.key, clip.source, plan.form.sample_rate, place.num_frames, own)
        yield info, spool.read(place.num_bytes)
