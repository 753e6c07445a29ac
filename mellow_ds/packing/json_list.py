"""Read a JSON file that holds a list, one entry at a time: the file is never in memory as a whole.

A file that is no such list is read again at once, unless it is large, so that the message names line and column.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mellow_ds.errors import PackingError

_BLOCK_BYTES = 1 << 20
_MOST_ENTRY_CHARS = 1 << 26  # of one entry; more is a quote that nothing closes, and would go on to the file's end
_EXPLAINED_BYTES = 1 << 26  # of a file that is read again as a whole, to say where its fault is
_BLANK = " \t\n\r"
_BLANKS = re.compile(f"[{_BLANK}]*")
_COMMA = re.compile(f"[{_BLANK}]*,[{_BLANK}]*(?=[^{_BLANK}])")
_AFTER_ENTRY = (*_BLANK, ",", "]")
_WANTED = "a JSON list of records (objects with filepath1 or clips, input, answer)"


class _NotAList(Exception):
    """The text is not a JSON list."""


class JsonList:
    """The entries of a JSON list, in order; `sha256` and `num_entries` are known when they have been walked through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        self.num_entries = 0

    def __iter__(self) -> Iterator[Any]:
        """Raises `PackingError` where the file cannot be read or is no list with an object in it."""
        has_object = False
        self.num_entries = 0
        try:
            for entry in self._entries():
                has_object = has_object or isinstance(entry, dict)
                self.num_entries += 1
                yield entry
        except OSError as error:
            raise PackingError(f"{self.path} cannot be read ({error.strerror}): correct --json") from None
        except (_NotAList, ValueError, RecursionError):
            raise self._explain() from None
        if self.num_entries and not has_object:
            raise PackingError(f"{self.path} holds a list without an object; wanted is {_WANTED}")

    def _entries(self) -> Iterator[Any]:
        digest = hashlib.sha256()
        decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        with self.path.open("rb") as file:
            scanner = _Scanner()
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                yield from scanner.feed(decode(block))
            yield from scanner.feed(decode(b"", True), is_last=True)
        self.sha256 = digest.hexdigest()

    def _explain(self) -> PackingError:
        try:
            if self.path.stat().st_size > _EXPLAINED_BYTES:
                return PackingError(
                    f"{self.path} is no JSON list from about entry {self.num_entries} on; wanted is {_WANTED}"
                )
            content = json.loads(self.path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError, OSError) as error:
            return PackingError(f"{self.path} is not JSON ({error}); wanted is {_WANTED}")
        return PackingError(f"{self.path} holds a JSON {type(content).__name__}; wanted is {_WANTED}")


class _Scanner:
    """Cuts a text that comes in blocks into the entries of a list."""

    def __init__(self) -> None:
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self._place = 0
        self._next = "["  # what may come: "[", the "first" entry or "]", another "entry", "," or "]"; "]": nothing
        self._wanted_chars = 0  # of the text, before an entry that was not whole is tried again

    def feed(self, block: str, is_last: bool = False) -> Iterator[Any]:
        """The entries that end within the text so far; raises `_NotAList` or `ValueError` for what is no list."""
        self._text = self._text[self._place :] + block
        self._place = 0
        if len(self._text) < self._wanted_chars and not is_last:
            return
        while self._skip_comma() or self._skip_blanks():
            char = self._text[self._place]
            if self._next == "entry" or (self._next == "first" and char != "]"):
                found, entry = self._take_entry(is_last)
                if not found:
                    return
                self._next = ","
                yield entry
                continue
            self._step(char)
        if is_last and self._next != "]":
            raise _NotAList  # it ends too early

    def _skip_comma(self) -> bool:
        """Over the comma after an entry and the blanks around it, at once: this is done for every entry."""
        found = _COMMA.match(self._text, self._place) if self._next == "," else None
        if found is None:
            return False
        self._next, self._place = "entry", found.end()
        return True

    def _skip_blanks(self) -> bool:
        blanks = _BLANKS.match(self._text, self._place)
        assert blanks is not None
        self._place = blanks.end()
        return self._place < len(self._text)

    def _step(self, char: str) -> None:
        """Over one of the list's own characters."""
        follows = {("[", "["): "first", ("first", "]"): "]", (",", ","): "entry", (",", "]"): "]"}
        if (self._next, char) not in follows:
            raise _NotAList
        self._next = follows[self._next, char]
        self._place += 1

    def _take_entry(self, is_last: bool) -> tuple[bool, Any]:
        try:
            entry, end = self._decode(self._text, self._place)
        except ValueError:
            end = -1
        # what must follow is looked at too: a number may go on in the next block
        if end < 0 or self._text[end : end + 1] not in _AFTER_ENTRY:
            if is_last or len(self._text) - self._place > _MOST_ENTRY_CHARS:
                raise _NotAList
            self._wanted_chars = 2 * (len(self._text) - self._place)
            return False, None
        self._place, self._wanted_chars = end, 0
        return True, entry
