"""What each shard is to hold: clips by placement, questions with their first clip.

The plans of a build are written into a file, one after the other, so that neither the build nor a worker holds more
than one of them; the questions stay in theirs.
"""

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.decode import Header
from mellow_ds.packing.placement import Placement, place_clips
from mellow_ds.packing.question_file import StoredQuestion, read_questions
from mellow_ds.packing.question_set import QuestionSet
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.survey import Survey

_FLAC_SHARE = 0.67  # of the bytes of 16-bit PCM, on everyday sound (854 of 1,283 kB a pair of clips)
_OPUS_BYTES_A_SECOND = 9_000  # mono, at libsndfile's default bit rate, whatever the source
_SAMPLE_OVERHEAD = 2_048  # tar headers, padding and the JSON without its questions
_QUESTION_OVERHEAD = 250  # JSON of a question beside its texts
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class AudioForm:
    """How clips are stored."""

    sample_rate: int  # Hz
    codec: str  # one of settings.CODECS


@dataclass(frozen=True)
class PlannedClip:
    """A clip that a shard is to hold."""

    key: str
    source: str  # path below the audio root
    questions: tuple[int, int] = (0, 0)  # (offset, number of bytes) in the file of questions; 0 bytes for a copy
    checksum: int = 0  # of the source file; 0: unknown


@dataclass(frozen=True)
class ShardPlan:
    """What one shard is to hold."""

    name: str  # file name of the tar
    clips: tuple[PlannedClip, ...]
    form: AudioForm

    def fingerprint(
        self, versions: str, questions: BinaryIO, on_question: Callable[[StoredQuestion], None] | None = None
    ) -> str:
        """Hash over all that the bytes of the shard follow from; `versions` are those of the libraries at work.

        `questions`: the file of questions, opened without a buffer; `on_question` is called for each that is read.
        """
        encode = msgspec.json.Encoder().encode
        digest = hashlib.sha256(encode([versions, self.form.sample_rate, self.form.codec]))
        for clip in self.clips:
            digest.update(encode([clip.key, clip.source]))
            for question in read_questions(questions, clip.questions):
                # the id of a question stands for its clips, texts and subtype
                digest.update(encode([question.id, question.taskname, question.captions]))
                if on_question is not None:
                    on_question(question)
        return digest.hexdigest()


class PlanFile:
    """The plans of all shards, in a file; `spans` can be sent to another process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.num_clips = array("q")  # by shard, copies included
        self._offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self.names)

    def add(self, plan: ShardPlan, file: BinaryIO) -> None:
        """Write a plan to the end of the file."""
        self._offsets.append(self._offsets[-1] + file.write(msgspec.json.encode(plan)))
        self.names.append(plan.name)
        self.num_clips.append(len(plan.clips))

    def span(self, number: int) -> tuple[int, int]:
        """(offset, number of bytes) of the plan of a shard."""
        return self._offsets[number], self._offsets[number + 1] - self._offsets[number]

    def read(self, number: int) -> ShardPlan:
        """The plan of a shard."""
        return read_plan(self.path, self.span(number))


def read_plan(path: Path, span: tuple[int, int]) -> ShardPlan:
    """The plan that stands at `span` of a file of plans."""
    with path.open("rb") as file:
        file.seek(span[0])
        return msgspec.json.decode(file.read(span[1]), type=ShardPlan)


def shard_name(number: int) -> str:
    """File name of the tar of a shard."""
    return f"shard-{number:06d}.tar"


def plan_shards(
    found: QuestionSet, survey: Survey, catalogue: Catalogue, settings: BuildSettings, path: Path
) -> PlanFile:
    """Write the plan of every shard into the file `path`: a function of the other arguments alone."""
    placement = _place(found, survey, settings)
    form = AudioForm(settings.sample_rate, settings.codec)
    plans = PlanFile(path)
    with path.open("wb") as file:
        for number, clips in enumerate(placement.shards):
            planned = (
                PlannedClip(
                    survey.key(clip),
                    catalogue.path_of(int(survey.sources[clip])),
                    found.file.span(clip) if placement.home[clip] == number else (0, 0),
                    int(survey.checksums[clip]),
                )
                for clip in clips
            )
            plans.add(ShardPlan(shard_name(number), tuple(planned), form), file)
    return plans


def _place(found: QuestionSet, survey: Survey, settings: BuildSettings) -> Placement:
    clip_bytes = np.zeros(survey.num_clips, np.int64)
    for clip in range(survey.num_clips):
        if found.asked[clip]:
            texts = _QUESTION_OVERHEAD * found.num_questions[clip] + found.num_chars[clip]
            clip_bytes[clip] = _SAMPLE_OVERHEAD + _audio_bytes(survey.header(clip), settings) + texts
    return place_clips(clip_bytes, found.pairs, round(settings.shard_megabytes * _MEGABYTE))


def _audio_bytes(header: Header, settings: BuildSettings) -> int:
    """Bytes of a clip's audio member, as an estimate."""
    if settings.codec == "opus":
        return round(header.num_frames / header.sample_rate * _OPUS_BYTES_A_SECOND)
    pcm_bytes = 2 * header.frames_at(settings.sample_rate)
    return round(pcm_bytes * _FLAC_SHARE) if settings.codec == "flac" else pcm_bytes
