"""What is wrong or lopsided with one or several shard folders (splits): findings, from rows of clips and questions.

Nothing is judged by ear or meaning: every finding is a plain count with its threshold. Splits are given in an order,
training first: a clip that several splits have is a finding of all but the last of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mellow_ds.errors import PackingError
from mellow_ds.packing.audit.scan import ShardNotes, ShardTask, merge_notes, scan_shard
from mellow_ds.packing.audit.settings import KINDS, AuditSettings
from mellow_ds.packing.inspection.levels import to_dbfs
from mellow_ds.packing.inspection.text_length import check_tokenizer
from mellow_ds.packing.shard_pool import each_shard
from mellow_ds.shard_format import FEATURES, Manifest, read_manifest

NUM_NAMED = 3  # examples of a finding whose places are kept
_CHOICE_SHARE = 0.5  # of the questions of a subtype that have options, from which on it is multiple choice
_FAR_ABOVE = 1.2  # times its share from which on a letter is right too often
_DEVIATIONS = 3  # and so many standard deviations, so that chance alone gives no warning


@dataclass(frozen=True)
class Split:
    """One shard folder of an audit."""

    name: str
    folder: Path
    manifest: Manifest
    seconds: float
    num_clips: int  # different ones
    num_questions: int


@dataclass(frozen=True)
class Finding:
    """All clips or questions of a split of which one thing is so."""

    kind: str  # of `KINDS`
    split: str
    ids: np.ndarray  # [n] bytes: keys of clips or ids of questions, sorted
    places: tuple[tuple[int, int], ...]  # of the first few ids: number of the shard, row of its index
    reasons: tuple[str, ...] = ()  # for each id, where they differ
    num_questions: int = 0  # that stand with the clips

    def reason(self, number: int, settings: AuditSettings) -> str:
        """Why the id `number` is in it, in words."""
        return f"{self.kind}: {self.reasons[number] if self.reasons else settings.title(self.kind)}"


@dataclass(frozen=True)
class Overlap:
    """What two splits have in common."""

    first: str
    second: str
    clips_by_key: int  # the same source file
    clips_by_audio: int  # other files, the same decoded samples
    questions: int  # same audio, prompt and answer


@dataclass(frozen=True)
class Letters:
    """Which options of multiple-choice questions are right."""

    split: str
    subtype: str  # "" for all of the split
    counts: dict[str, int]  # by letter
    expected: dict[str, float]  # where each option of a question is right equally often
    far_above: tuple[str, ...]  # letters that are right far more often than that


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts of a split: least, median, 99 of 100 at most, most."""

    split: str
    text: str  # "prompt" or "answer"
    values: tuple[float, float, float, float]


@dataclass(frozen=True)
class AuditReport:
    """Everything that an audit found."""

    settings: AuditSettings
    splits: tuple[Split, ...]
    coverage: dict[str, dict[str, int]]  # questions by subtype and split
    findings: tuple[Finding, ...]
    overlaps: tuple[Overlap, ...]
    letters: tuple[Letters, ...]
    lengths: tuple[Lengths, ...]
    levels: dict[str, tuple[float, float, float]]  # RMS dBFS by split: least, median, most
    problems: tuple[str, ...]  # a line for each damaged sample
    notes: tuple[str, ...] = field(default=())  # what was not, or could not be looked at

    @property
    def is_serious(self) -> bool:
        """Whether something was found that --strict does not let pass."""
        return any(len(finding.ids) and KINDS[finding.kind].serious for finding in self.findings)


def audit_shards(
    folders: Mapping[str, str | Path], settings: AuditSettings | None = None, workers: int = 1, progress: bool = False
) -> AuditReport:
    """Audit shard folders by split name, training first, in `workers` processes.

    Raises `ShardError` where a manifest, an index or a whole tar cannot be used, `PackingError` for a tokenizer that
    cannot be loaded. A damaged sample is a finding.
    """
    settings = settings or AuditSettings()
    if not folders:
        raise PackingError("no shard folder to audit: name one, or SPLIT=DIR for each split")
    if settings.tokenizer:
        check_tokenizer(settings.tokenizer)
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    tasks = [
        ShardTask(Path(folders[name]), replace(manifest, shards=(shard,)), split, number, settings)
        for split, (name, manifest) in enumerate(manifests.items())
        for number, shard in enumerate(manifest.shards)
    ]
    num_samples = sum(task.info.num_samples for task in tasks)
    with tqdm(total=num_samples, desc="auditing", unit="clip", disable=None if progress else True) as bar:
        noted = merge_notes(each_shard(scan_shard, tasks, workers, bar))
    return draw_conclusions(noted, {name: Path(folder) for name, folder in folders.items()}, manifests, settings)


def draw_conclusions(
    noted: ShardNotes, folders: Mapping[str, Path], manifests: Mapping[str, Manifest], settings: AuditSettings
) -> AuditReport:
    """The report of what was noted of all shards."""
    names = tuple(folders)
    clips, questions = _stored_once(noted.clips), noted.questions
    splits = []
    findings: list[Finding] = []
    letters: list[Letters] = []
    lengths: list[Lengths] = []
    levels: dict[str, tuple[float, float, float]] = {}
    choice = _choice_subtypes(questions, len(noted.subtypes))
    for number, name in enumerate(names):
        own, asked = clips[clips["split"] == number], questions[questions["split"] == number]
        seconds = float(own["num_frames"].sum() / manifests[name].sample_rate)
        splits.append(Split(name, folders[name], manifests[name], seconds, len(own), len(asked)))
        findings += _clip_findings(name, own, settings) + _question_findings(name, asked, choice, settings)
        letters += _letters(name, asked[choice[asked["subtype"]]], noted.subtypes)
        lengths += [Lengths(name, text, _four(asked[f"{text}_length"])) for text in ("prompt", "answer") if len(asked)]
        heard = own[own["heard"]]
        if len(heard):
            rms = to_dbfs(heard["rms"])
            levels[name] = (float(rms.min()), float(np.median(rms)), float(rms.max()))
    findings += _shared(names, clips, questions)
    order = {kind: place for place, kind in enumerate(KINDS)}
    return AuditReport(
        settings=settings,
        splits=tuple(splits),
        coverage=_coverage(names, questions, noted.subtypes),
        findings=tuple(sorted(findings, key=lambda found: (order[found.kind], names.index(found.split)))),
        overlaps=_overlaps(names, clips, questions),
        letters=tuple(letters),
        lengths=tuple(lengths),
        levels=levels,
        problems=tuple(noted.problems),
        notes=_notes(manifests, settings),
    )


def _stored_once(clips: np.ndarray) -> np.ndarray:
    """One row a clip and split, sorted by both, with the questions of all its copies; a whole copy before a damaged."""
    clips = clips[np.lexsort((clips["damaged"], clips["key"], clips["split"]))]
    if not len(clips):
        return clips
    is_first = np.ones(len(clips), dtype=bool)
    is_first[1:] = (clips["key"][1:] != clips["key"][:-1]) | (clips["split"][1:] != clips["split"][:-1])
    starts = np.flatnonzero(is_first)
    once = clips[starts].copy()
    once["num_questions"] = np.add.reduceat(clips["num_questions"], starts)
    once["damaged"] = np.logical_or.reduceat(clips["damaged"], starts)
    return once


def _clip_finding(kind: str, split: str, clips: np.ndarray, reasons: tuple[str, ...] = ()) -> Finding:
    return Finding(kind, split, clips["key"], _places(clips), reasons, int(clips["num_questions"].sum()))


def _places(rows: np.ndarray) -> tuple[tuple[int, int], ...]:
    return tuple((int(row["shard"]), int(row["row"])) for row in rows[:NUM_NAMED])


def _clip_findings(split: str, clips: np.ndarray, settings: AuditSettings) -> list[Finding]:
    """Damaged, silent, clipped and duplicate clips of one split (rows sorted by key)."""
    damaged = clips["damaged"]
    heard = clips["heard"] & ~damaged
    peak, rms = to_dbfs(clips["peak"]), to_dbfs(clips["rms"])
    silent = heard & ((peak < settings.silent_peak) | (rms < settings.silent_rms))
    clipped = heard & (clips["clipped"] > settings.clipped_share)
    levels = zip(peak[silent].tolist(), rms[silent].tolist(), strict=True)
    shares = clips["clipped"][clipped].tolist()
    duplicates, kept = _duplicates(clips[~damaged])
    return [
        _clip_finding("damaged", split, clips[damaged]),
        _clip_finding("silent", split, clips[silent], tuple(f"peak {a:.1f} dBFS, RMS {b:.1f} dBFS" for a, b in levels)),
        _clip_finding("clipped", split, clips[clipped], tuple(f"{s:.1%} of its samples at full scale" for s in shares)),
        _clip_finding("duplicate", split, duplicates, tuple(f"same audio as {key.decode()}" for key in kept.tolist())),
    ]


def _duplicates(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(clips whose audio another has, key of the one that is kept for each).

    Kept is the one with the most questions, of several the one with the first key.
    """
    order = np.lexsort((clips["key"], -clips["num_questions"].astype(np.int64), clips["num_frames"], clips["audio"]))
    ordered = clips[order]
    same = np.zeros(len(ordered), dtype=bool)
    same[1:] = (ordered["audio"][1:] == ordered["audio"][:-1]) & (
        ordered["num_frames"][1:] == ordered["num_frames"][:-1]
    )
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(ordered)))) if len(ordered) else same
    found, kept = ordered[same], ordered["key"][first[same]] if len(ordered) else ordered["key"]
    by_key = np.argsort(found["key"], kind="stable")
    return found[by_key], kept[by_key]


def _choice_subtypes(questions: np.ndarray, num_subtypes: int) -> np.ndarray:
    """[subtypes] bool: multiple choice by the records' own words, or because most of its questions have options."""
    subtype = questions["subtype"]
    total = np.bincount(subtype, minlength=num_subtypes)
    with_options = np.bincount(subtype[questions["num_options"] > 0], minlength=num_subtypes)
    named = np.bincount(subtype[questions["named_choice"]], minlength=num_subtypes)
    return (named > 0) | (with_options > _CHOICE_SHARE * total)


def _question_findings(split: str, asked: np.ndarray, choice: np.ndarray, settings: AuditSettings) -> list[Finding]:
    is_choice = choice[asked["subtype"]] if len(asked) else np.zeros(0, dtype=bool)
    failed = asked[is_choice & (asked["right"] == 0)]
    failed = failed[np.argsort(failed["id"])]
    reasons = tuple(
        "the answer names none of the options" if count else "multiple choice without lettered options"
        for count in failed["num_options"].tolist()
    )
    return [
        _question_finding("repeated-question", split, _repeated(asked)),
        _question_finding("empty", split, asked[asked["empty"]]),
        Finding("options", split, failed["id"], _places(failed), reasons),
        _question_finding("long-prompt", split, asked[asked["prompt_length"] > settings.ip_text_len]),
        _question_finding("long-answer", split, asked[asked["answer_length"] > settings.op_text_len]),
    ]


def _question_finding(kind: str, split: str, asked: np.ndarray) -> Finding:
    asked = asked[np.argsort(asked["id"])]
    return Finding(kind, split, asked["id"], _places(asked))


def _repeated(asked: np.ndarray) -> np.ndarray:
    """Questions with the audio, prompt and answer of another; the one with the first id is not among them."""
    ordered = asked[np.lexsort((asked["id"], asked["content"]))]
    same = np.zeros(len(ordered), dtype=bool)
    same[1:] = ordered["content"][1:] == ordered["content"][:-1]
    return ordered[same]


def _shared(names: tuple[str, ...], clips: np.ndarray, questions: np.ndarray) -> list[Finding]:
    """Clips and questions of each split but the last that a later one has, too."""
    found = []
    clips = clips[~clips["damaged"]]
    for number, name in enumerate(names[:-1]):
        own = clips[clips["split"] == number]
        by_key, by_audio = np.zeros((2, len(names), len(own)), dtype=bool)
        for later in range(number + 1, len(names)):
            other = clips[clips["split"] == later]
            by_key[later] = np.isin(own["key"], other["key"])
            by_audio[later] = np.isin(own["audio"], other["audio"])
        shared = (by_key | by_audio).any(axis=0)
        reasons = tuple(
            _where_else(names, by_key[:, place], by_audio[:, place]) for place in np.flatnonzero(shared).tolist()
        )
        found.append(_clip_finding("shared-clip", name, own[shared], reasons))
        asked, later_asked = questions[questions["split"] == number], questions[questions["split"] > number]
        found.append(_question_finding("shared-question", name, asked[_asked_too(asked, later_asked)]))
    return found


def _asked_too(asked: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `asked` are among `others`, about the same files or the same audio."""
    return np.isin(asked["content"], others["content"]) | np.isin(asked["record"], others["record"])


def _where_else(names: tuple[str, ...], by_key: np.ndarray, by_audio: np.ndarray) -> str:
    """In which splits a clip is too; `by_key` and `by_audio` are bool [splits]."""
    holders = [name for name, here in zip(names, by_key | by_audio, strict=True) if here]
    return f"also in {' and '.join(holders)}" + ("" if by_key.any() else ", as another file with the same audio")


def _overlaps(names: tuple[str, ...], clips: np.ndarray, questions: np.ndarray) -> tuple[Overlap, ...]:
    found = []
    clips = clips[~clips["damaged"]]
    for first in range(len(names)):
        for second in range(first + 1, len(names)):
            own, other = clips[clips["split"] == first], clips[clips["split"] == second]
            by_key = np.isin(own["key"], other["key"])
            by_audio = np.isin(own["audio"], other["audio"]) & ~by_key
            shared = _asked_too(questions[questions["split"] == first], questions[questions["split"] == second])
            counts = (int(by_key.sum()), int(by_audio.sum()), int(shared.sum()))
            found.append(Overlap(names[first], names[second], *counts))
    return tuple(found)


def _letters(split: str, asked: np.ndarray, subtypes: list[str]) -> list[Letters]:
    """Balance over the multiple-choice questions `asked` of a split, and over each subtype of them."""
    readable = asked[asked["right"] > 0]
    present = np.unique(readable["subtype"]).tolist()
    found = [_balance(split, "", readable)] if len(present) > 1 else []
    return found + [_balance(split, subtypes[one], readable[readable["subtype"] == one]) for one in present]


def _balance(split: str, subtype: str, asked: np.ndarray) -> Letters:
    counts, expected, far_above = {}, {}, []
    for place in range(int(asked["num_options"].max())):
        letter = chr(ord("a") + place)
        # a question with n options has each of its letters right once in n
        chances = 1 / asked["num_options"][asked["num_options"] > place].astype(np.float64)
        counts[letter] = int(np.count_nonzero(asked["right"] == place + 1))
        expected[letter] = float(chances.sum())
        deviation = float(np.sqrt((chances * (1 - chances)).sum()))
        if counts[letter] > max(_FAR_ABOVE * expected[letter], expected[letter] + _DEVIATIONS * deviation):
            far_above.append(letter)
    return Letters(split, subtype, counts, expected, tuple(far_above))


def _coverage(names: tuple[str, ...], questions: np.ndarray, subtypes: list[str]) -> dict[str, dict[str, int]]:
    table = {
        name: np.bincount(questions["subtype"][questions["split"] == number], minlength=len(subtypes))
        for number, name in enumerate(names)
    }
    return {subtype: {name: int(table[name][i]) for name in names} for i, subtype in enumerate(subtypes)}


def _four(values: np.ndarray) -> tuple[float, float, float, float]:
    return (
        float(values.min()),
        float(np.median(values)),
        float(np.quantile(values, 0.99, method="higher")),
        float(values.max()),
    )


def _notes(manifests: Mapping[str, Manifest], settings: AuditSettings) -> tuple[str, ...]:
    notes = []
    if not settings.tokenizer:
        notes.append(
            "texts are measured in words; a word is often more than one token: --tokenizer gives the lengths that "
            "training sees"
        )
    unheard = [name for name, manifest in manifests.items() if manifest.codec == FEATURES]
    if unheard:
        notes.append(f"{', '.join(unheard)}: features, so there was no audio to look for silence and clipping in")
    forms = {(manifest.sample_rate, manifest.codec == FEATURES, manifest.codec) for manifest in manifests.values()}
    if (
        len({(rate, features, codec if codec not in ("flac", "pcm") else "exact") for rate, features, codec in forms})
        > 1
    ):
        notes.append(
            "the splits differ in sample rate or lossy codec: equal audio in two of them is found by its key alone"
        )
    return tuple(notes)
