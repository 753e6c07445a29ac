"""From scored predictions to numbers, and from numbers to the table in the terminal. No torch, no files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mellow_ds.evaluation.answers import KINDS
from mellow_ds.evaluation.predictions import Prediction
from mellow_ds.packing.chance import chance_levels

RESULTS_NAME = "results.json"
_Z_95 = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson_interval(num_correct: int, num_examples: int) -> tuple[float, float]:
    """95 % interval of a proportion by Wilson's score method; (0, 1) where there is nothing.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). Unlike
    the normal interval it stays within 0 .. 1 and is not empty at 0 or 100 percent.
    """
    if num_examples == 0:
        return 0.0, 1.0
    share, z2 = num_correct / num_examples, _Z_95**2
    centre = (share + z2 / (2 * num_examples)) / (1 + z2 / num_examples)
    half = _Z_95 * math.sqrt(share * (1 - share) / num_examples + z2 / (4 * num_examples**2)) / (1 + z2 / num_examples)
    # at the ends the formula gives 0 and 1 but for rounding
    low = 0.0 if num_correct == 0 else centre - half
    high = 1.0 if num_correct == num_examples else centre + half
    return low, high


def summarise(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracy overall, by kind and by subtype.

    Each entry holds `n` (examples), `num_correct`, `accuracy` (share of all n; an unreadable answer is wrong),
    `interval_95` ([low, high], Wilson), and as counts `unreadable` and `unfinished` (cut at max_new_tokens). A subtype
    also has its `kind` (several, joined by `+`, where its examples differ) and `chance`: the accuracy of the best
    answer that is the same for every question (mellow_ds.packing.chance), computed from these examples.
    """
    subtypes = sorted({p.subtype for p in predictions})
    chance = chance_levels([{"input": p.question, "answer": p.answer, "subtype": p.subtype} for p in predictions])
    by_subtype = {}
    for subtype in subtypes:
        own = [p for p in predictions if p.subtype == subtype]
        kinds = [kind for kind in KINDS if any(p.kind == kind for p in own)]
        by_subtype[subtype] = {"kind": "+".join(kinds), **_entry(own), "chance": chance.get(subtype)}
    by_kind = {kind: [p for p in predictions if p.kind == kind] for kind in KINDS}
    return {
        "num_examples": len(predictions),
        "overall": _entry(predictions),
        "by_kind": {kind: _entry(own) for kind, own in by_kind.items() if own},
        "by_subtype": by_subtype,
    }


def _entry(predictions: Sequence[Prediction]) -> dict[str, Any]:
    n, num_correct = len(predictions), sum(p.correct for p in predictions)
    return {
        "n": n,
        "num_correct": num_correct,
        "accuracy": num_correct / n if n else None,
        "interval_95": list(wilson_interval(num_correct, n)),
        "unreadable": sum(not p.readable for p in predictions),
        "unfinished": sum(not p.finished for p in predictions),
    }


def format_results(results: Mapping[str, Any]) -> str:
    """A table for the terminal: a row a subtype, then the kinds and all; accuracy without audio where it was taken."""
    silenced = results.get("silenced")
    header = ["subtype", "scored by", "n", "accuracy", "95 % interval", "chance"]
    header += ["silenced"] if silenced is not None else []
    header += ["unreadable"]
    rows = [header]
    for section, prefix in (("by_subtype", ""), ("by_kind", "all ")):
        for name, entry in results[section].items():
            other = None if silenced is None else silenced[section].get(name)
            rows.append(_row(prefix + name, entry, other, silenced is not None))
    overall_silenced = None if silenced is None else silenced["overall"]
    rows.append(_row("all", results["overall"], overall_silenced, silenced is not None))
    text = _align(rows)
    remarks = [] if silenced is None else _remarks(results["overall"], silenced["overall"])
    captions = results.get("captions") or {}
    return "\n".join([text, *remarks, *(_format_captions(subtype, metrics) for subtype, metrics in captions.items())])


def _remarks(heard: Mapping[str, Any], silenced: Mapping[str, Any]) -> list[str]:
    """What the accuracy of all without audio means, where it is within the interval of that with audio, or above."""
    low, high = heard["interval_95"]
    if not heard["n"] or not silenced["n"] or silenced["accuracy"] < low:
        return []
    return [
        f"accuracy with silence ({_percent(silenced['accuracy'])}) is as high as with audio "
        f"({_percent(heard['accuracy'])}, {_percent(low)} .. {_percent(high)}): answers do not depend on what is heard"
    ]


def _row(name: str, entry: Mapping[str, Any], silenced: Mapping[str, Any] | None, with_silenced: bool) -> list[str]:
    low, high = entry["interval_95"]
    row = [name, entry.get("kind", ""), str(entry["n"]), _percent(entry["accuracy"])]
    row += [f"{_percent(low)} .. {_percent(high)}", _percent(entry.get("chance"))]
    if with_silenced:
        row.append(_percent(silenced["accuracy"] if silenced else None))
    return [*row, str(entry["unreadable"])]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _format_captions(subtype: str, metrics: Mapping[str, Any]) -> str:
    scores = [f"{name} {value:.3f}" for name, value in metrics["scores"].items() if value is not None]
    missing = [f"no {name}: {reason}" for name, reason in metrics["reasons"].items()]
    about = f"{metrics['num_items']} items, {metrics['num_references']} references, {metrics['tokenizer']} tokens"
    return f"{subtype} as captions ({about}): {', '.join(scores)}" + "".join(f"\n  {line}" for line in missing)
