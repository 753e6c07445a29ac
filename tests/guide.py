"""The troubleshooting page, for the tests that make its symptoms happen."""

import re
from collections.abc import Iterator
from pathlib import Path

_PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def quoted(words: str) -> str:
    """`words` of a message, in a test that makes it happen; fails where the page does not quote them."""
    assert words in _PAGE, f"docs/troubleshooting.md does not quote: {words}"
    return words


def symptoms() -> Iterator[str]:
    """Every message that a table of the page quotes, in its first column."""
    for line in _PAGE.splitlines():
        first = line.split(" | ")[0]
        if first.startswith("| "):
            yield from re.findall(r"`([^`]+)`", first)
