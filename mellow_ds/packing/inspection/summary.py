"""What a shard folder holds, as numbers and a text table: from manifest, indexes and texts; levels of some clips."""

import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mellow_ds.errors import ShardError
from mellow_ds.packing.inspection.levels import measure_levels, to_dbfs
from mellow_ds.packing.settings import OPUS_SAMPLE_RATE
from mellow_ds.packing.verify import DamagedSample, decode_member, read_member, read_sample
from mellow_ds.prompt import render_question
from mellow_ds.shard_format import FEATURES, Manifest, SampleInfo, ShardInfo, read_index, read_manifest

_LEGEND = "  (least / median / most)"


@dataclass(frozen=True)
class Summary:
    """Counts, sizes, lengths and levels of a shard folder."""

    manifest: Manifest
    num_stored: int  # clips in all shards, copies included
    num_bytes: int  # of all tars
    clip_seconds: np.ndarray  # [num_clips]
    clip_questions: np.ndarray  # [num_clips]
    prompt_words: np.ndarray  # [num_questions] words as the model is given them, a placeholder by its first phrasing
    answer_words: np.ndarray  # [num_questions]
    peak_dbfs: np.ndarray  # [clips that were decoded]
    rms_dbfs: np.ndarray  # [clips that were decoded]


def summarize(folder: str | Path, num_levels: int = 0, progress: bool = False) -> Summary:
    """Read manifest, indexes and texts, and decode `num_levels` clips for their levels: those with the first keys,
    which are hashes, so that it is a fair draw, the same each time.

    Raises `ShardError` where manifest, an index or a sample cannot be used.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    frames: dict[bytes, int] = {}
    questions: dict[bytes, int] = {}
    for shard in manifest.shards:
        rows = read_index(folder, shard)
        for key, num_frames, num_questions in zip(
            rows["key"].tolist(), rows["num_frames"].tolist(), rows["num_questions"].tolist(), strict=True
        ):
            frames[key] = num_frames
            questions[key] = questions.get(key, 0) + num_questions
    prompts, answers = _count_words(folder, manifest, progress)
    drawn = heapq.nsmallest(num_levels, frames) if manifest.codec != FEATURES else []
    peaks, rms = _sample_levels(folder, manifest, drawn, progress)
    return Summary(
        manifest=manifest,
        num_stored=sum(shard.num_samples for shard in manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        clip_seconds=np.array(list(frames.values()), dtype=np.float64) / manifest.sample_rate,
        clip_questions=np.array(list(questions.values())),
        prompt_words=prompts,
        answer_words=answers,
        peak_dbfs=peaks,
        rms_dbfs=rms,
    )


def format_summary(folder: str | Path, summary: Summary) -> str:
    """The table, ending without a line break."""
    manifest, seconds, questions = summary.manifest, summary.clip_seconds, summary.clip_questions
    rows = [
        ("folder", str(folder)),
        ("audio", _describe_audio(manifest)),
        ("shards", f"{len(manifest.shards):,}"),
        ("bytes", f"{summary.num_bytes:,}"),
        ("clips", f"{manifest.num_clips:,}"),
        ("stored clips", f"{summary.num_stored:,} ({summary.num_stored / max(manifest.num_clips, 1):.3f} a clip)"),
        ("questions", f"{manifest.num_questions:,}"),
        ("hours", f"{seconds.sum() / 3600:.3f}"),
    ]
    if len(seconds):
        rows += [
            ("seconds a clip", f"{seconds.min():.2f} / {np.median(seconds):.2f} / {seconds.max():.2f}{_LEGEND}"),
            ("questions a clip", f"{_three(questions)}{_LEGEND}"),
        ]
    if len(summary.prompt_words):
        rows += [
            ("words a prompt", f"{_three(summary.prompt_words)}{_LEGEND}"),
            ("words an answer", f"{_three(summary.answer_words)}{_LEGEND}"),
        ]
    if len(summary.peak_dbfs):
        decoded = f"dBFS{_LEGEND[:-1]}, of {len(summary.peak_dbfs):,} clips)"
        rows += [("peak level", f"{_decibels(summary.peak_dbfs)} {decoded}")]
        rows += [("RMS level", f"{_decibels(summary.rms_dbfs)} {decoded}")]
    rows += [("", ""), ("subtype", "questions")]
    rows += [(name or "(none)", f"{count:,}") for name, count in manifest.subtypes.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _describe_audio(manifest: Manifest) -> str:
    if manifest.features is not None:
        return f"none: features of {manifest.features.encoder_name}, at most {manifest.features.max_crops} crops a clip"
    if manifest.codec == "opus":
        return f"opus, stored at {OPUS_SAMPLE_RATE} Hz, read at {manifest.sample_rate} Hz, mono"
    return f"{manifest.codec}, {manifest.sample_rate} Hz, mono, 16 bit"


def _three(values: np.ndarray) -> str:
    return f"{values.min()} / {np.median(values):g} / {values.max()}"


def _decibels(values: np.ndarray) -> str:
    return " / ".join(f"{value:.1f}" for value in (values.min(), np.median(values), values.max()))


def _count_words(folder: Path, manifest: Manifest, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Words of (prompts, answers) [questions]; only the JSON members are read."""
    prompts, answers = array("I"), array("I")
    with _bar(sum(shard.num_samples for shard in manifest.shards), "reading texts", progress) as bar:
        for shard in manifest.shards:
            for info in sample_infos(folder, shard):
                for question in info.questions:
                    prompt, answer = render_question(question.input, question.answer, question.captions, None)
                    prompts.append(len(prompt.split()))
                    answers.append(len(answer.split()))
                bar.update()
    return np.array(prompts), np.array(answers)


def sample_infos(folder: Path, shard: ShardInfo) -> Iterable[SampleInfo]:
    """The JSON members of a shard, in the order of storage; raises `ShardError` at one that cannot be read."""
    path = folder / shard.name
    with _open(path) as tar:
        for row in read_index(folder, shard):
            where = f"{path}, clip {row['key'].decode('ascii', 'replace')}"
            try:
                yield SampleInfo.from_json(read_member(tar, int(row["json_offset"]), int(row["json_bytes"])), where)
            except DamagedSample as fault:
                raise ShardError(f"{where}: {fault}: `mellow-shards verify` tells all that is wrong") from None


def _sample_levels(
    folder: Path, manifest: Manifest, keys: list[bytes], progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(peak, RMS) in dBFS of the clips `keys`, in the order of storage."""
    wanted, peaks, rms = set(keys), [], []
    with _bar(len(wanted), "measuring levels", progress) as bar:
        for shard in manifest.shards:
            rows = read_index(folder, shard) if wanted else ()
            path = folder / shard.name
            for row in [row for row in rows if row["key"] in wanted]:
                wanted.discard(row["key"])
                where = f"{path}, clip {row['key'].decode('ascii', 'replace')}"
                try:
                    with _open(path) as tar:
                        levels = measure_levels(decode_member(*read_sample(tar, row, where)))
                except DamagedSample as fault:
                    raise ShardError(f"{where}: {fault}: `mellow-shards verify` tells all that is wrong") from None
                peaks.append(levels.peak)
                rms.append(levels.rms)
                bar.update()
    return to_dbfs(np.array(peaks)), to_dbfs(np.array(rms))


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}): copy it again or build the shards anew") from None


def _bar(total: int, what: str, progress: bool) -> Any:
    return tqdm(total=total, desc=what, unit="clip", leave=False, disable=None if progress else True)
