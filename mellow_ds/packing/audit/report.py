"""An audit's report: as text for the terminal, as JSON for a program, and as a drop-list for `mellow-shards build`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mellow_ds.errors import FaultError, PackingError, ShardError
from mellow_ds.packing.audit.findings import AuditReport, Finding, Letters, Split
from mellow_ds.packing.audit.settings import KINDS
from mellow_ds.packing.shard_file import published
from mellow_ds.packing.verify import DamagedSample, read_sample
from mellow_ds.shard_format import read_index

_NUM_LETTERS = 60  # of a text in the terminal
_NUM_LISTED = 1000  # ids of a finding in the JSON; the drop-list has all
_NUM_PROBLEMS = 20  # damaged samples that the terminal names


def format_report(report: AuditReport) -> str:
    """The report as text of several tables, ending without a line break."""
    parts = [
        _table(
            ["split", "clips", "questions", "hours", "shards", "audio", "folder"], _split_rows(report), left=(0, 5, 6)
        ),
        _table(["questions by subtype", *_names(report)], _coverage_rows(report)),
        _table(["findings (! serious)", *_names(report)], _finding_rows(report)),
    ]
    if report.overlaps:
        rows = [
            [f"{one.first} and {one.second}", f"{one.clips_by_key:,}", f"{one.clips_by_audio:,}", f"{one.questions:,}"]
            for one in report.overlaps
        ]
        header = ["in both splits", "clips by key", "more by audio", "questions"]
        parts.append(_table(header, rows))
    if report.letters:
        parts.append(_letter_table(report.letters))
    if report.lengths:
        parts.append(_length_table(report))
    parts += ["\n".join(lines) for lines in (_examples(report), _warnings(report)) if lines]
    return "\n\n".join(parts)


def report_as_json(report: AuditReport) -> dict[str, Any]:
    """The report as plain values; of each finding at most 1,000 ids are listed."""
    return {
        "format_version": 1,
        "settings": {**vars(report.settings), "unit": report.settings.unit},
        "serious": report.is_serious,
        "splits": {
            split.name: {
                "folder": str(split.folder),
                "fingerprint": split.manifest.fingerprint,
                "codec": split.manifest.codec,
                "sample_rate": split.manifest.sample_rate,
                "clips": split.num_clips,
                "questions": split.num_questions,
                "seconds": round(split.seconds, 3),
                "rms_dbfs_least_median_most": _rounded(report.levels.get(split.name, ())),
            }
            for split in report.splits
        },
        "coverage": report.coverage,
        "findings": [
            {
                "kind": found.kind,
                "split": found.split,
                "what": KINDS[found.kind].what,
                "title": report.settings.title(found.kind),
                "serious": KINDS[found.kind].serious,
                "count": len(found.ids),
                "questions": found.num_questions if KINDS[found.kind].what == "clip" else len(found.ids),
                "ids": [key.decode() for key in found.ids[:_NUM_LISTED].tolist()],
            }
            for found in report.findings
        ],
        "overlaps": [vars(one) for one in report.overlaps],
        "letters": [
            {**vars(one), "expected": {letter: round(value, 3) for letter, value in one.expected.items()}}
            for one in report.letters
        ],
        "lengths": [
            {"split": one.split, "text": one.text, "least_median_99_percent_most": list(one.values)}
            for one in report.lengths
        ],
        "problems": list(report.problems),
        "notes": list(report.notes),
        "warnings": _warnings(report),
    }


def write_json(report: AuditReport, path: Path) -> None:
    """Write the report as JSON; raises `PackingError` where that cannot be."""
    text = json.dumps(report_as_json(report), indent=1, ensure_ascii=False)
    _write(path, f"{text}\n")


def drop_lines(report: AuditReport, split: str, kinds: Sequence[str]) -> Iterator[dict[str, str]]:
    """What `mellow-shards build --drop-list` is to leave out of `split`: each clip or question once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for found in report.findings:
        if found.split == split and found.kind in kinds:
            for number, key in enumerate(found.ids.tolist()):
                named = (KINDS[found.kind].what, key.decode())
                reasons.setdefault(named, []).append(found.reason(number, report.settings))
    for (kind, key), why in reasons.items():
        yield {"kind": kind, "id": key, "reason": "; ".join(why)}


def write_drop_list(report: AuditReport, split: str, kinds: Sequence[str], path: Path) -> tuple[int, int]:
    """Write the drop-list of a split as JSON lines; returns how many (clips, questions) are in it."""
    lines = list(drop_lines(report, split, kinds))
    _write(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    num_clips = sum(line["kind"] == "clip" for line in lines)
    return num_clips, len(lines) - num_clips


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with published(path) as file:
            file.write(text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        problem = f"{path} cannot be written ({error.strerror})"
        if isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError | IsADirectoryError):
            raise PackingError(f"{problem}: name another file") from None
        raise FaultError(f"{problem}: free some space, or name another file") from None


def _names(report: AuditReport) -> list[str]:
    return [split.name for split in report.splits]


def _split_rows(report: AuditReport) -> list[list[str]]:
    return [
        [
            split.name,
            f"{split.num_clips:,}",
            f"{split.num_questions:,}",
            f"{split.seconds / 3600:.2f}",
            f"{len(split.manifest.shards):,}",
            f"{split.manifest.codec}, {split.manifest.sample_rate} Hz",
            str(split.folder),
        ]
        for split in report.splits
    ]


def _coverage_rows(report: AuditReport) -> list[list[str]]:
    return [
        [subtype or "(none)", *(f"{counts[name]:,}" if counts[name] else "-" for name in _names(report))]
        for subtype, counts in report.coverage.items()
    ]


def _finding_rows(report: AuditReport) -> list[list[str]]:
    by_place = {(found.kind, found.split): found for found in report.findings}
    rows = []
    for kind, meaning in KINDS.items():
        here = [by_place.get((kind, name)) for name in _names(report)]
        if all(found is None for found in here):
            continue
        mark = "! " if meaning.serious and any(found is not None and len(found.ids) for found in here) else "  "
        title = f"{mark}{kind}: {report.settings.title(kind)}"
        rows.append([title, *(_share(found, split) for found, split in zip(here, report.splits, strict=True))])
    return rows


def _share(found: Finding | None, split: Split) -> str:
    if found is None:
        return ""
    if not len(found.ids):
        return "-"
    total = split.num_clips if KINDS[found.kind].what == "clip" else split.num_questions
    return f"{len(found.ids):,} ({len(found.ids) / max(total, 1):.1%})"


def _letter_table(letters: Sequence[Letters]) -> str:
    most = max(len(one.counts) for one in letters)
    header = ["right option", *(chr(ord("a") + place) for place in range(most)), "questions", "warning"]
    rows = []
    for one in letters:
        total = sum(one.counts.values())
        cells = [f"{count:,} ({count / max(total, 1):.0%})" for count in one.counts.values()]
        said = " and ".join(f'"{letter}"' for letter in one.far_above)
        verb = "is" if len(one.far_above) == 1 else "are"
        warning = f"{said} {verb} right far more often than its share" if one.far_above else ""
        name = f"{one.split}, {one.subtype or 'all'}"
        rows.append([name, *cells, *[""] * (most - len(cells)), f"{total:,}", warning])
    return _table(header, rows, left=(0, len(header) - 1))


def _length_table(report: AuditReport) -> str:
    limits = {"prompt": report.settings.ip_text_len, "answer": report.settings.op_text_len}
    rows = [
        [f"{one.split}, {one.text}s", *(f"{value:g}" for value in _rounded(one.values)), str(limits[one.text])]
        for one in report.lengths
    ]
    return _table([f"length in {report.settings.unit}", "least", "median", "99% at most", "most", "kept at most"], rows)


def _examples(report: AuditReport) -> list[str]:
    """The first few of each finding, with source files or texts."""
    splits = {split.name: split for split in report.splits}
    lines = []
    for found in report.findings:
        for number, (key, place) in enumerate(zip(found.ids.tolist(), found.places, strict=False)):
            why = f" ({found.reasons[number]})" if found.reasons else ""
            said = _describe(splits[found.split], place, key.decode())
            lines.append(f"{found.kind}: {found.split} {key.decode()} {said}".rstrip() + why)
        if len(found.ids) > len(found.places):
            lines.append(f"{found.kind}: {found.split} and {len(found.ids) - len(found.places):,} more")
    return lines


def _describe(split: Split, place: tuple[int, int], key: str) -> str:
    """What stands at `place` (shard, row): the source of the clip `key`, or prompt and answer of the question `key`."""
    shard = split.manifest.shards[place[0]]
    try:
        with (split.folder / shard.name).open("rb") as tar:
            _, info = read_sample(tar, read_index(split.folder, shard)[place[1]], "")
    except (DamagedSample, ShardError, OSError):
        return ""
    asked = next((question for question in info.questions if question.id == key), None)
    return info.source if asked is None else f"{_short(asked.input)!r} -> {_short(asked.answer)!r}"


def _short(text: str) -> str:
    return text if len(text) <= _NUM_LETTERS else f"{text[: _NUM_LETTERS - 3]}..."


def _warnings(report: AuditReport) -> list[str]:
    """What has no place in a table."""
    lines = []
    names = _names(report)
    for subtype, counts in report.coverage.items():
        if len(names) > 1 and not counts[names[0]]:
            others = " and ".join(name for name in names[1:] if counts[name])
            lines.append(f"note: subtype {subtype or '(none)'} is in {others}, but not in {names[0]}")
    for problem in report.problems[:_NUM_PROBLEMS]:
        lines.append(f"damaged: {problem}")
    if len(report.problems) > _NUM_PROBLEMS:
        lines.append(f"damaged: and {len(report.problems) - _NUM_PROBLEMS:,} more: `mellow-shards verify` names them")
    return lines + [f"note: {note}" for note in report.notes]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: tuple[int, ...] = (0,)) -> str:
    """Columns as wide as their widest cells; those of `left` to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
