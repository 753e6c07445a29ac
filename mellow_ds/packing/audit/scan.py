"""What an audit notes of each clip and question of one shard: a row of a table each, some tens of bytes.

A shard is read once, a sample at a time; the rows of all shards together are what the findings are drawn from
(audit.py), so that memory grows with clips and questions, never with audio.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from mellow_ds.errors import ShardError
from mellow_ds.multiple_choice import parse_options, read_option
from mellow_ds.packing.audit.settings import AuditSettings
from mellow_ds.packing.inspection.levels import measure_levels
from mellow_ds.packing.inspection.text_length import answer_lengths, prompt_lengths
from mellow_ds.packing.verify import DamagedSample, decode_member, read_sample
from mellow_ds.prompt import PHRASINGS, render_question
from mellow_ds.shard_format import (
    FEATURES,
    KEY_LENGTH,
    Manifest,
    Question,
    SampleInfo,
    ShardInfo,
    check_shard_size,
    read_index,
)

CHOICE_NAMES = ("mcq", "multiple choice", "multiple-choice", "multiple_choice", "multichoice", "multi-choice")

CLIP_DTYPE = np.dtype(
    [
        ("key", f"S{KEY_LENGTH}"),
        ("split", "<u2"),
        ("shard", "<u4"),  # of the split's folder
        ("row", "<u4"),  # of the shard's index
        ("audio", "<u8"),  # hash of the decoded samples, or of the stored bytes of features
        ("num_frames", "<u4"),
        ("num_questions", "<u4"),
        ("peak", "<f4"),  # 1 is full scale
        ("rms", "<f4"),
        ("clipped", "<f4"),  # share of the samples
        ("damaged", "?"),
        ("heard", "?"),  # decoded; False for features
    ]
)
QUESTION_DTYPE = np.dtype(
    [
        ("id", f"S{KEY_LENGTH}"),
        ("split", "<u2"),
        ("shard", "<u4"),
        ("row", "<u4"),  # of the sample that holds it
        ("content", "<u8"),  # hash of its clips' audio, prompt and answer
        ("record", "<u8"),  # hash of its clips' keys, prompt and answer: the same in another codec
        ("subtype", "<u2"),  # number in a list of names
        ("prompt_length", "<u4"),
        ("answer_length", "<u4"),
        ("num_options", "u1"),
        ("right", "u1"),  # number of the right option from 1; 0: the answer names none
        ("named_choice", "?"),  # the record says that it is multiple choice
        ("empty", "?"),
    ]
)


@dataclass(frozen=True)
class ShardTask:
    """One shard to look through."""

    folder: Path
    manifest: Manifest  # with this shard alone: with all of them it would be sent to the processes for each
    split: int
    shard: int  # number in the whole manifest
    settings: AuditSettings

    @property
    def info(self) -> ShardInfo:
        """What the manifest says of it."""
        return self.manifest.shards[0]


@dataclass
class ShardNotes:
    """What was noted of one shard."""

    clips: np.ndarray  # [clips] CLIP_DTYPE
    questions: np.ndarray  # [questions] QUESTION_DTYPE; `subtype` numbers `subtypes`
    subtypes: list[str]
    problems: list[str] = field(default_factory=list)  # a line for each damaged sample


@dataclass
class _Asked:
    """A question on its way to a row."""

    question: Question
    prompt: str
    answer: str


def scan_shard(task: ShardTask, count: Callable[[], None]) -> ShardNotes:
    """Look through one shard, calling `count` for each sample; raises `ShardError` where it cannot be used at all."""
    rows = read_index(task.folder, task.info)
    check_shard_size(task.folder, task.info)
    path = task.folder / task.info.name
    clips = np.zeros(len(rows), CLIP_DTYPE)
    parts: list[np.ndarray] = []
    others: list[tuple[int, tuple[str, ...]]] = []  # (number of the question, clips beyond its first)
    notes = ShardNotes(clips, np.zeros(0, QUESTION_DTYPE), [])
    names: dict[str, int] = {}
    num_questions = 0
    with path.open("rb") as tar:
        for number, row in enumerate(rows):
            clip = clips[number]
            clip["key"], clip["split"], clip["shard"], clip["row"] = row["key"], task.split, task.shard, number
            clip["num_frames"], clip["num_questions"] = row["num_frames"], row["num_questions"]
            key = row["key"].decode("ascii", "replace")
            try:
                audio, info = read_sample(tar, row, f"{path}, clip {key}")
                _listen(clip, audio, info, task)
            except (ShardError, DamagedSample) as error:
                clip["damaged"] = True
                where = "" if isinstance(error, ShardError) else f"{path}, clip {key}: "
                notes.problems.append(f"{where}{error}")
            else:
                parts.append(_question_rows(info, clip, task, names))
                for place, question in enumerate(info.questions):
                    if len(question.clips) > 1:
                        others.append((num_questions + place, question.clips[1:]))
                num_questions += len(info.questions)
            count()
    notes.questions = np.concatenate(parts) if parts else notes.questions
    notes.subtypes = list(names)
    _add_other_clips(notes, others)
    return notes


def _listen(clip: np.void, audio: bytes, info: SampleInfo, task: ShardTask) -> None:
    """Fill in what the audio of a clip says."""
    if task.manifest.codec == FEATURES:
        clip["audio"] = xxhash.xxh3_64_intdigest(audio)
        return
    samples = decode_member(audio, info)
    levels = measure_levels(samples)
    clip["heard"] = True
    clip["audio"] = xxhash.xxh3_64_intdigest(samples.tobytes())
    clip["peak"], clip["rms"], clip["clipped"] = levels.peak, levels.rms, levels.clipped


def _question_rows(info: SampleInfo, clip: np.void, task: ShardTask, names: dict[str, int]) -> np.ndarray:
    """The rows of a clip's questions; `names` numbers the subtypes."""
    rows = np.zeros(len(info.questions), QUESTION_DTYPE)
    asked = [_Asked(q, *render_question(q.input, q.answer, q.captions, None)) for q in info.questions]
    tokenizer = task.settings.tokenizer
    prompts = prompt_lengths([one.prompt for one in asked], tokenizer)
    answers = answer_lengths([one.answer for one in asked], tokenizer)
    for row, one, prompt_length, answer_length in zip(rows, asked, prompts, answers, strict=True):
        question = one.question
        if len(question.id) > KEY_LENGTH:
            raise ShardError(f"question {question.id} of clip {info.key} has an id of another format: build anew")
        row["id"], row["split"], row["shard"], row["row"] = question.id.encode(), task.split, clip["shard"], clip["row"]
        row["subtype"] = names.setdefault(question.subtype, len(names))
        row["prompt_length"] = max(prompt_length, _longest_phrasing(question.input, tokenizer))
        row["answer_length"] = answer_length
        row["empty"] = not one.prompt.strip() or not one.answer.strip()
        said = f"{question.subtype} {question.taskname}".lower()
        row["named_choice"] = any(name in said for name in CHOICE_NAMES)
        options = parse_options(one.prompt)
        row["num_options"] = len(options)
        right = read_option(one.answer, options) if options else None
        row["right"] = ord(right) - ord("a") + 1 if right else 0
        texts = "\x1f".join(" ".join(text.lower().split()) for text in (one.prompt, one.answer))
        row["content"] = _mix(int(clip["audio"]), texts)
        row["record"] = _mix(0, "\x1f".join((*question.clips, texts)))
    return rows


def _longest_phrasing(prompt: str, tokenizer: str) -> int:
    """Length of the longest text that a placeholder stands for; 0 for a plain question."""
    placeholder = prompt.strip().lower()
    return _family_length(placeholder, tokenizer) if placeholder in PHRASINGS else 0


@lru_cache(maxsize=64)
def _family_length(placeholder: str, tokenizer: str) -> int:
    return max(prompt_lengths(PHRASINGS[placeholder], tokenizer))


def _mix(seed: int, text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=seed)


def _add_other_clips(notes: ShardNotes, others: Sequence[tuple[int, tuple[str, ...]]]) -> None:
    """Work the audio of second and later clips, which stand in the same shard, into the content of their questions."""
    audio = {key: int(value) for key, value in zip(notes.clips["key"].tolist(), notes.clips["audio"], strict=True)}
    for number, keys in others:
        content = int(notes.questions["content"][number])
        for key in keys:
            content = _mix(content, str(audio.get(key.encode(), key)))
        notes.questions["content"][number] = content


def merge_notes(notes: Sequence[ShardNotes]) -> ShardNotes:
    """The notes of several shards as one, with one numbering of the subtypes."""
    counts = Counter(name for part in notes for name in part.subtypes)
    subtypes = sorted(counts)
    number = {name: place for place, name in enumerate(subtypes)}
    for part in notes:
        renumbered = np.array([number[name] for name in part.subtypes], dtype=np.uint16)
        if len(renumbered):
            part.questions["subtype"] = renumbered[part.questions["subtype"]]
    empty = ShardNotes(np.zeros(0, CLIP_DTYPE), np.zeros(0, QUESTION_DTYPE), [])
    return ShardNotes(
        np.concatenate([part.clips for part in [empty, *notes]]),
        np.concatenate([part.questions for part in [empty, *notes]]),
        subtypes,
        [problem for part in notes for problem in part.problems],
    )
