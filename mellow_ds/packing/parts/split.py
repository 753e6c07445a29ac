"""Which records a part of a build packs: a pure function of the records and of the sizes of the audio files.

Every part of N computes the same split by itself: clips are placed into small pieces along the graph of pairs (as
placement.py places them into shards), and the pieces, in order, are dealt out in N runs of about equal size. A record
goes with its first clip, so few pairs cross from one part to another, and a clip is copied only where one does.
Nothing is decoded or hashed for this: clips are known by their paths here, their sizes are those of the source files.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.placement import Pairs, place_clips
from mellow_ds.packing.records import Record, Rejection
from mellow_ds.packing.settings import BuildSettings

_PIECES_A_PART = 8  # parts differ by about the size of a piece
_PAIRS_AT_ONCE = 1 << 20  # taken in before they are sorted among those that are known
_NUMBER_BITS = 32
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1


def part_folder(out: Path, settings: BuildSettings) -> Path:
    """Where a build writes: `out` itself, or the folder of its part below it."""
    if not settings.num_parts:
        return out
    return out / f"part-{settings.part:05d}-of-{settings.num_parts:05d}"


class PathGraph:
    """The audio files of all records, by number, and which are asked about together."""

    def __init__(self) -> None:
        self.is_first = bytearray()  # by number: 1 where a record has the path in front
        self._known = np.zeros(0, np.int64)  # the pairs, each once, ascending: first path, then other path
        self._new = array("q")

    def add(self, numbers: Sequence[int]) -> None:
        """Take in the paths of a record."""
        self.is_first.extend(bytes(max(0, max(numbers) + 1 - len(self.is_first))))
        self.is_first[numbers[0]] = True
        self._new.extend((numbers[0] << _NUMBER_BITS) + other for other in set(numbers[1:]))
        if len(self._new) >= max(_PAIRS_AT_ONCE, len(self._known) // 2):
            self._settle()

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """([num_pairs] first, [num_pairs] other) of all pairs, each once."""
        self._settle()
        return self._known >> _NUMBER_BITS, self._known & _NUMBER_MASK

    def _settle(self) -> None:
        self._known = np.unique(np.concatenate([self._known, np.array(self._new, np.int64)]))
        self._new = array("q")


@dataclass(frozen=True)
class PartShare:
    """What one part packs of all records."""

    number: int
    num_parts: int
    homes: np.ndarray  # [num_paths] bool: records with this path in front belong to the part
    files: np.ndarray  # [num_paths] bool: the paths of those records

    def records(self, records: Iterable[Record | Rejection], catalogue: Catalogue) -> Iterator[Record | Rejection]:
        """Those of the part."""
        for record in records:
            if isinstance(record, Rejection):
                # it has no clip: any part will do, but only one
                is_ours = record.record % self.num_parts == self.number
            else:
                first = catalogue.number_of(record.paths[0])
                is_ours = first < len(self.homes) and bool(self.homes[first])
            if is_ours:
                yield record


def share_of_part(graph: PathGraph, file_bytes: np.ndarray, catalogue: Catalogue, settings: BuildSettings) -> PartShare:
    """The share of the part that the settings name; `file_bytes` [num_paths] are the sizes of the audio files."""
    firsts, others = graph.pairs()
    homes = split_paths(file_bytes, catalogue, firsts, others, settings.num_parts) == settings.part
    files = homes & np.frombuffer(bytes(graph.is_first), dtype=bool)
    files[others[homes[firsts]]] = True
    return PartShare(settings.part, settings.num_parts, homes, files)


def split_paths(
    file_bytes: np.ndarray, catalogue: Catalogue, firsts: np.ndarray, others: np.ndarray, num_parts: int
) -> np.ndarray:
    """[num_paths] the part of each path. Its questions are packed there; its partners may be copied there.

    `firsts`, `others` [num_pairs]: the numbers of paths that are asked about together, each pair once.
    """
    order = _mixed_order(catalogue)
    place_of = np.empty(len(order), np.int64)
    place_of[order] = np.arange(len(order))
    sizes = np.maximum(file_bytes[order], 1)
    linked = np.sort((place_of[firsts] << _NUMBER_BITS) + place_of[others])
    partners = Pairs.from_sorted(len(order), linked >> _NUMBER_BITS, linked & _NUMBER_MASK)
    placement = place_clips(sizes, partners, max(int(sizes.sum()) // (_PIECES_A_PART * num_parts), 1))
    # with the copies, which are decoded and stored too: clips with many partners take the longest
    pieces = [int(sizes[piece].sum()) for piece in placement.shards]
    num_all, part_of_piece, before = sum(pieces), [], 0
    for num_bytes in pieces:
        part_of_piece.append((2 * before + num_bytes) * num_parts // (2 * num_all))  # by the middle of the piece
        before += num_bytes
    return np.array(part_of_piece, np.int32)[placement.home[place_of]] if pieces else np.zeros(0, np.int32)


def _mixed_order(catalogue: Catalogue) -> np.ndarray:
    """[num_paths] the numbers of all paths in the order of a hash, which mixes data sets over the parts."""
    names = np.zeros(len(catalogue), dtype="S32")
    for number, path in catalogue.in_order():
        names[number] = hashlib.sha256(path.encode()).digest()
    return np.argsort(names, kind="stable")
