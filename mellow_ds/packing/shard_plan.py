"""What each shard is to hold: clips by placement, questions with their first clip. Plain data, ready for a worker."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from mellow_ds.packing.decode import Header
from mellow_ds.packing.placement import Placement, place_clips
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.survey import SourceClip
from mellow_ds.shard_format import Question

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
    questions: tuple[Question, ...]  # none for a copy
    checksum: int = 0  # of the source file; 0: unknown


@dataclass(frozen=True)
class ShardPlan:
    """What one shard is to hold."""

    name: str  # file name of the tar
    clips: tuple[PlannedClip, ...]
    form: AudioForm

    def fingerprint(self, versions: str) -> str:
        """Hash over all that the bytes of the shard follow from; `versions` are those of the libraries at work."""
        digest = hashlib.sha256(json.dumps([versions, self.form.sample_rate, self.form.codec]).encode())
        for clip in self.clips:
            # the id of a question stands for its clips, texts and subtype
            questions = [(question.id, question.taskname, question.captions) for question in clip.questions]
            digest.update(json.dumps([clip.key, clip.source, questions]).encode())
        return digest.hexdigest()


def shard_name(number: int) -> str:
    """File name of the tar of a shard."""
    return f"shard-{number:06d}.tar"


def plan_shards(
    questions: Sequence[Question], clips: dict[str, SourceClip], settings: BuildSettings
) -> list[ShardPlan]:
    """The plan of every shard, a function of the arguments alone; `clips` by key."""
    placement = _place(questions, clips, settings)
    by_clip: dict[str, list[Question]] = {}
    for question in questions:
        by_clip.setdefault(question.clips[0], []).append(question)
    form = AudioForm(settings.sample_rate, settings.codec)
    plans = []
    for number, keys in enumerate(placement.shards):
        own = {key: tuple(by_clip.get(key, ())) for key in keys if placement.home[key] == number}
        planned = (PlannedClip(key, clips[key].source, own.get(key, ()), clips[key].checksum) for key in keys)
        plans.append(ShardPlan(shard_name(number), tuple(planned), form))
    return plans


def _place(questions: Sequence[Question], clips: dict[str, SourceClip], settings: BuildSettings) -> Placement:
    clip_bytes: dict[str, int] = {}
    partners: dict[str, set[str]] = {}
    for question in questions:
        for key in question.clips:
            if key not in clip_bytes:
                clip_bytes[key] = _SAMPLE_OVERHEAD + _audio_bytes(clips[key].header, settings)
        first, *others = question.clips
        texts = (question.input, question.answer, *question.captions)
        clip_bytes[first] += _QUESTION_OVERHEAD + sum(map(len, texts))
        partners.setdefault(first, set()).update(others)
    return place_clips(clip_bytes, partners, round(settings.shard_megabytes * _MEGABYTE))


def _audio_bytes(header: Header, settings: BuildSettings) -> int:
    """Bytes of a clip's audio member, as an estimate."""
    if settings.codec == "opus":
        return round(header.num_frames / header.sample_rate * _OPUS_BYTES_A_SECOND)
    pcm_bytes = 2 * header.frames_at(settings.sample_rate)
    return round(pcm_bytes * _FLAC_SHARE) if settings.codec == "flac" else pcm_bytes
