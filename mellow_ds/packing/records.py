"""Question-answer records as people have them, read from JSON into one form for 1, 2 or more clips. Opens no audio.

Two forms are read: ReasonAQA's (`filepath1, filepath2, caption1, caption2, input, answer, subtype, taskname`) and a
generic one with lists (`clips, captions, input, answer, subtype, taskname`). A record that cannot be used is not an
error but a `Rejection`; a file that is no list of records is a `PackingError`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from mellow_ds.errors import PackingError
from mellow_ds.packing.json_list import JsonList
from mellow_ds.prompt import render_question

MAX_CLIPS = 64  # clips of one question; more is a mistake in the file


class Record(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One question about one or more audio files. A struct: a corpus has millions, and they are made in no time."""

    file: str  # name of the JSON file
    number: int  # position in that file, from 0
    paths: tuple[str, ...]  # below the audio root, `/` between folders
    captions: tuple[str, ...]  # one a clip, or none
    input: str
    answer: str
    subtype: str
    taskname: str


class Rejection(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A record that is left out, and why: a line of rejected.jsonl."""

    file: str
    record: int
    path: str  # the audio file at fault; empty where the record itself is
    reason: str  # one of a few fixed texts, to count by
    detail: str = ""  # what was found


@dataclass(frozen=True)
class JsonSource:
    """A JSON file that records came from."""

    name: str  # file name, with as many folders as tell it from the others
    sha256: str
    num_records: int  # rejected ones included


@dataclass(frozen=True)
class RecordSet:
    """What the JSON files hold, in their order."""

    records: list[Record]
    rejections: list[Rejection]
    sources: tuple[JsonSource, ...]

    @property
    def num_records(self) -> int:
        """All records, rejected ones included."""
        return sum(source.num_records for source in self.sources)


class _Unusable(Exception):
    """A record that cannot be used: (reason, detail, path)."""

    def __init__(self, reason: str, detail: str = "", path: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.path = reason, detail, path


class RecordStream:
    """The records of JSON files, in order, one at a time: no file is ever in memory as a whole.

    What cannot be used comes as a `Rejection` in its place. `sources` are known when all has been walked through. It
    can be walked through again, which reads the files again.
    """

    def __init__(self, json_files: Sequence[str | Path]) -> None:
        """Raises `PackingError` where no file is given, or one twice."""
        if not json_files:
            raise PackingError("no JSON file is given: name at least one with --json")
        self._paths = [Path(file) for file in json_files]
        self.names = _distinct_names(self._paths)
        self.sources: tuple[JsonSource, ...] = ()

    def __iter__(self) -> Iterator[Record | Rejection]:
        """Raises `PackingError` naming a file that cannot be used as a whole."""
        sources = []
        for path, name in zip(self._paths, self.names, strict=True):
            entries = JsonList(path)
            for number, entry in enumerate(entries):
                yield _record_of(entry, name, number)
            sources.append(JsonSource(name, entries.sha256, entries.num_entries))
        self.sources = tuple(sources)


def read_records(json_files: Sequence[str | Path]) -> RecordSet:
    """All records of files that memory holds, in order. Raises `PackingError` as `RecordStream` does."""
    stream = RecordStream(json_files)
    found: tuple[list[Record], list[Rejection]] = ([], [])
    for record in stream:
        if isinstance(record, Record):
            found[0].append(record)
        else:
            found[1].append(record)
    return RecordSet(*found, stream.sources)


def _record_of(entry: Any, file: str, number: int) -> Record | Rejection:
    try:
        return _parse_record(entry, file, number)
    except _Unusable as fault:
        return Rejection(file, number, fault.path, fault.reason, fault.detail)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    if len({path.resolve() for path in paths}) < len(paths):
        raise PackingError(f"a JSON file is given twice among {', '.join(map(str, paths))}: name each once")
    depth = 1
    while True:
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _parse_record(entry: Any, file: str, number: int) -> Record:
    if not isinstance(entry, dict):
        raise _Unusable("not an object", type(entry).__name__)
    paths, captions = _clips_and_captions(entry)
    prompt = _text(entry, "input")
    if not prompt.strip():
        raise _Unusable("input is empty")
    answer = _text(entry, "answer")
    if not answer.strip():
        _check_captions_answer(prompt, captions, len(paths))
    taskname = _text(entry, "taskname", "")
    return Record(
        file=file,
        number=number,
        paths=tuple(map(_inside_root, paths)),
        captions=captions,
        input=prompt,
        answer=answer,
        subtype=_text(entry, "subtype", "") or taskname,
        taskname=taskname,
    )


def _clips_and_captions(entry: dict[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    if "clips" in entry:
        paths = _texts(entry, "clips")
        captions = _texts(entry, "captions") if entry.get("captions") is not None else []
        if len(captions) not in (0, len(paths)):
            raise _Unusable("captions do not match clips", f"{len(captions)} captions, {len(paths)} clips")
    else:
        paths, captions = [_text(entry, "filepath1")], [_text(entry, "caption1", "")]
        second = _text(entry, "filepath2", "")
        if second.strip():
            paths.append(second)
            captions.append(_text(entry, "caption2", ""))
    if not 1 <= len(paths) <= MAX_CLIPS:
        raise _Unusable("number of clips", f"{len(paths)}; at least 1, at most {MAX_CLIPS}")
    if not any(caption.strip() for caption in captions):
        captions = []
    return paths, tuple(captions)


def _check_captions_answer(prompt: str, captions: tuple[str, ...], num_clips: int) -> None:
    """A blank answer is good for a caption placeholder only, which is answered with the captions."""
    has_all = len(captions) == num_clips and all(caption.strip() for caption in captions)
    if not has_all or not render_question(prompt, "", captions, None)[1]:
        raise _Unusable("answer is empty")


def _text(entry: dict[str, Any], field: str, default: str | None = None) -> str:
    value = entry.get(field)
    if type(value) is str and value.isascii():  # nearly all, and this is called for every field of every record
        return value
    if value is None:
        if default is not None:
            return default
        raise _Unusable(f"{field} is missing")
    return _checked_text(value, field)


def _texts(entry: dict[str, Any], field: str) -> list[str]:
    values = entry[field]
    if not isinstance(values, list):
        raise _Unusable(f"{field} is not a list", type(values).__name__)
    return [_checked_text(value, field) for value in values]


def _checked_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"{field} is not text", type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no file can hold
        raise _Unusable(f"{field} is not Unicode text") from None
    return value


@lru_cache(1 << 15)  # a path comes once with each of its questions
def _inside_root(path: str) -> str:
    """The path with `/` between folders; refused where it could leave the audio root."""
    slashed = path.strip().replace("\\", "/")
    parts = [part for part in slashed.split("/") if part not in ("", ".")]
    if slashed.startswith("/") or re.match(r"[A-Za-z]:", slashed) or ".." in parts:
        raise _Unusable("path leaves the audio root", path=path)
    if not parts:
        raise _Unusable("path is empty", path=path)
    if "\0" in slashed:
        raise _Unusable("path is not a file name", path=path)
    return "/".join(parts)
