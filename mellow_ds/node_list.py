"""SLURM's way of writing many host names, `gpu[003-005,009],login1`, expanded without a call to its programs."""

import itertools
import re
from collections.abc import Iterator

from mellow_ds.errors import ConfigError

_MAX_HOSTS = 65_536  # of a list, as in SLURM; a slip such as n[1-9999999999] must not fill the memory
_PARTS = re.compile(r"[^\[\],\s]+|\[[^\[\]\s]*\]")  # of an entry, in turns: as it stands, and in brackets
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand_node_list(text: str, name: str = "the node list") -> list[str]:
    """The hosts of a list in its order, such as `["r1n01", "r1n02", "r2n01", "r2n02"]` of `r[1-2]n[01-02]`.

    Entries stand between commas, each with as many brackets as it likes; the last bracket counts fastest; a number
    has at least the digits of the first of its range. `name`: of the variable, for the message of `ConfigError`.
    """
    hosts: list[str] = []
    try:
        for entry in filter(None, map(str.strip, _split(text))):
            pieces = [_alternatives(part) for part in _parts(entry)]
            hosts += itertools.islice(map("".join, itertools.product(*pieces)), _MAX_HOSTS + 1)
            if len(hosts) > _MAX_HOSTS:
                raise ValueError(f"more than {_MAX_HOSTS} hosts")
        if not hosts:
            raise ValueError("no host")
    except ValueError as error:
        raise ConfigError(f"{name} is '{text}', not a list of hosts such as gpu[003-005,9],login1: {error}") from None
    return hosts


def expand_counts(text: str, name: str) -> list[int]:
    """SLURM's numbers of tasks by node, `4(x2),3`, as [4, 4, 3]; raises `ConfigError` naming the variable `name`."""
    counts: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?", word.strip())
        if match is None:
            raise ConfigError(f"{name} is '{text}', not numbers of tasks by node such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
        if len(counts) > _MAX_HOSTS:
            raise ConfigError(f"{name} is '{text}': more than {_MAX_HOSTS} nodes")
    return counts


def _split(text: str) -> Iterator[str]:
    """The entries between those commas that stand outside of brackets."""
    depth, first = 0, 0
    for place, character in enumerate(text):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        elif character == "," and depth == 0:
            yield text[first:place]
            first = place + 1
    yield text[first:]


def _parts(entry: str) -> list[str]:
    parts = _PARTS.findall(entry)
    if "".join(parts) != entry:
        raise ValueError(f"'{entry}' has a bracket too few or too many")
    return parts


def _alternatives(part: str) -> list[str]:
    """What can stand in one place of a name: the part itself, or the numbers of its bracket."""
    if not part.startswith("["):
        return [part]
    numbers: list[str] = []
    for word in part[1:-1].split(","):
        match = _RANGE.fullmatch(word)
        if match is None:
            raise ValueError(f"'{word}' is not a number or a range")
        low, high = int(match[1]), int(match[2] or match[1])
        if not low <= high < low + _MAX_HOSTS:
            raise ValueError(f"'{word}' is not a range from low to high of at most {_MAX_HOSTS} hosts")
        numbers += [str(number).zfill(len(match[1])) for number in range(low, high + 1)]
    return numbers
