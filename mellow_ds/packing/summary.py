"""What a shard folder holds, as a text table: from manifest and indexes, without reading a tar."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mellow_ds.shard_format import Manifest, read_index, read_manifest

_LEGEND = "  (least / median / most)"


@dataclass(frozen=True)
class Summary:
    """Counts and sizes of a shard folder."""

    manifest: Manifest
    num_stored: int  # clips in all shards, copies included
    num_bytes: int  # of all tars
    clip_seconds: np.ndarray  # [num_clips]
    clip_questions: np.ndarray  # [num_clips]


def summarize(folder: str | Path) -> Summary:
    """Raises `ShardError` where manifest or an index cannot be used."""
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
    return Summary(
        manifest=manifest,
        num_stored=sum(shard.num_samples for shard in manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        clip_seconds=np.array(list(frames.values()), dtype=np.float64) / manifest.sample_rate,
        clip_questions=np.array(list(questions.values())),
    )


def format_summary(folder: str | Path, summary: Summary) -> str:
    """The table, ending without a line break."""
    manifest, seconds, questions = summary.manifest, summary.clip_seconds, summary.clip_questions
    rows = [
        ("folder", str(folder)),
        ("audio", f"{manifest.codec}, {manifest.sample_rate} Hz, mono, 16 bit"),
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
            ("questions a clip", f"{questions.min()} / {np.median(questions):g} / {questions.max()}{_LEGEND}"),
        ]
    rows += [("", ""), ("subtype", "questions")]
    rows += [(name or "(none)", f"{count:,}") for name, count in manifest.subtypes.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)
