"""What a shard folder holds, as a picture of histograms. matplotlib is imported here alone, and only when asked for."""

from pathlib import Path
from typing import Any

import numpy as np

from mellow_ds.errors import PackingError
from mellow_ds.packing.inspection.summary import Summary

_COLOURS = ("#3b6ea8", "#d9822b")
_MAX_SUBTYPES = 14  # bars; the others are added up
_MAX_NAME = 28  # letters of a subtype
_TIGHT = {"borderaxespad": 0, "handlelength": 1.2, "handletextpad": 0.5, "columnspacing": 1.2}  # of a legend
_MAX_BINS = 40
_MIN_WHOLE = 8  # whole numbers that a panel spans at least, so that one bar is not a wall


def plot_summary(folder: str | Path, summary: Summary, path: Path) -> None:
    """Write the picture to `path`, a .png (or .svg, .pdf); raises `PackingError` where it cannot be made."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PackingError(
            "--plot needs matplotlib, which is not installed: pip install 'mellow-ds[plot]', or leave --plot out"
        ) from None
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.12, h_pad=0.1)  # inches
    figure.suptitle(_title(folder, summary), fontsize=13)
    axes = figure.subplots(2, 3).ravel()
    _histogram(axes[0], [("", summary.clip_seconds)], "Duration of a clip (seconds)", "clips")
    _histogram(axes[1], [("", summary.clip_questions)], "Questions of a clip", "clips", whole=True)
    _subtypes(axes[2], summary.manifest.subtypes)
    _histogram(axes[3], [("", summary.prompt_words)], "Length of a prompt (words)", "questions", whole=True)
    _histogram(axes[4], [("", summary.answer_words)], "Length of an answer (words)", "questions", whole=True)
    levels = [("peak", summary.peak_dbfs), ("RMS", summary.rms_dbfs)]
    _histogram(axes[5], levels, f"Level (dBFS), {len(summary.peak_dbfs):,} clips measured", "clips")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not write
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise PackingError(f"--plot {path} cannot be written ({reason}): name a .png file elsewhere") from None


def _title(folder: str | Path, summary: Summary) -> str:
    manifest = summary.manifest
    hours = summary.clip_seconds.sum() / 3600
    return (
        f"{Path(folder).name}: {manifest.num_clips:,} clips ({hours:,.2f} hours), {manifest.num_questions:,} "
        f"questions, {len(manifest.shards):,} {'shard' if len(manifest.shards) == 1 else 'shards'} of {manifest.codec}"
    )


def _histogram(axis: Any, series: list[tuple[str, np.ndarray]], label: str, counted: str, whole: bool = False) -> None:
    """One panel; `whole`: the values are whole numbers, so that bars stand over them."""
    axis.set_xlabel(label)
    axis.set_ylabel(f"Number of {counted}")
    _plain(axis)
    if not all(len(values) for _, values in series):
        axis.text(0.5, 0.5, "none measured", ha="center", va="center", transform=axis.transAxes, color="grey")
        axis.set_xticks([])
        axis.set_yticks([])
        return
    together = np.concatenate([values for _, values in series])
    edges = _edges(together, whole)
    for (name, values), colour in zip(series, _COLOURS, strict=False):
        alpha = 0.65 if len(series) > 1 else 0.9
        label = f"{name} (median {np.median(values):.1f})"
        axis.hist(values, edges, color=colour, alpha=alpha, label=label, edgecolor="white", linewidth=0.4)
        line = colour if len(series) > 1 else "black"
        axis.axvline(float(np.median(values)), color=line, linestyle="--", linewidth=1.2)
    if len(series) > 1:
        # above the panel: inside, it would lie on bars or medians
        axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=2, **_TIGHT)
    else:
        number = "{:g}" if whole else "{:.2f}"
        said = [number.format(value) for value in (together.min(), together.max(), np.median(together))]
        axis.set_title(f"from {said[0]} to {said[1]}, median {said[2]} (dashed)", fontsize=9, loc="left")
    if whole:
        middle = (edges[0] + edges[-1]) / 2
        reach = max((edges[-1] - edges[0]) / 2 * 1.05, _MIN_WHOLE / 2)
        axis.set_xlim(middle - reach, middle + reach)
        axis.locator_params(axis="x", integer=True)


def _edges(values: np.ndarray, whole: bool) -> np.ndarray:
    """Edges of at most 40 equal bins; for whole numbers each covers as many of them as the others."""
    low, high = float(values.min()), float(values.max())
    if whole:
        step = max(int(np.ceil((high - low + 1) / _MAX_BINS)), 1)
        return np.arange(low - 0.5, high + step, step)
    if high - low < 1e-6 * max(abs(high), 1):
        return np.array([low - 0.5, high + 0.5])
    num_bins = int(np.clip(np.sqrt(len(values)), 8, _MAX_BINS))
    return np.linspace(low, high, num_bins + 1)


def _subtypes(axis: Any, subtypes: dict[str, int]) -> None:
    ordered = sorted(subtypes.items(), key=lambda item: -item[1])
    shown = [(_short(name or "(none)"), count) for name, count in ordered[:_MAX_SUBTYPES]]
    rest = ordered[_MAX_SUBTYPES:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    places = np.arange(len(shown))
    axis.barh(places, [count for _, count in shown], color=_COLOURS[0], alpha=0.9)
    axis.set_yticks(places, [name for name, _ in shown], fontsize=9)
    axis.invert_yaxis()
    for place, (_, count) in zip(places, shown, strict=True):
        axis.annotate(f"{count:,}", (count, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_xlabel("Questions by subtype")
    axis.margins(x=0.18)
    _plain(axis)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}..."


def _plain(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    counted = axis.xaxis if axis.get_xlabel().startswith("Questions by") else axis.yaxis
    counted.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    counted.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.spines[["top", "right"]].set_visible(False)
