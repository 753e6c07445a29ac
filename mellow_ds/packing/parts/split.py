"""Which records a part of a build packs: a pure function of the records and of the sizes of the audio files.

Every part of N computes the same split by itself: clips are placed into small pieces along the graph of pairs (as
placement.py places them into shards), and the pieces, in order, are dealt out in N runs of about equal size. A record
goes with its first clip, so few pairs cross from one part to another, and a clip is copied only where one does.
Nothing is decoded or hashed for this: clips are known by their paths here, their sizes are those of the source files.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mellow_ds.packing.placement import place_clips
from mellow_ds.packing.records import Record, RecordSet, Rejection, read_records
from mellow_ds.packing.settings import BuildSettings

_PIECES_A_PART = 8  # parts differ by about the size of a piece


def part_folder(out: Path, settings: BuildSettings) -> Path:
    """Where a build writes: `out` itself, or the folder of its part below it."""
    if not settings.num_parts:
        return out
    return out / f"part-{settings.part:05d}-of-{settings.num_parts:05d}"


@dataclass
class PathGraph:
    """The audio files of all records and which are asked about together; knows no more of the records than that."""

    partners: dict[str, set[str]] = field(default_factory=dict)  # path of a first clip: its partners
    paths: set[str] = field(default_factory=set)

    def add(self, record: Record | Rejection) -> bool:
        """Take in a record; False, so that `read_records` keeps none."""
        if isinstance(record, Record):
            first, *others = record.paths
            self.paths.update(record.paths)
            if others:
                self.partners.setdefault(first, set()).update(others)
        return False


def read_graph(json_files: Sequence[str | Path]) -> tuple[PathGraph, RecordSet]:
    """(the audio files of all records, the sources of the records without any record). Raises `PackingError`."""
    graph = PathGraph()
    return graph, read_records(json_files, graph.add)


def read_part(json_files: Sequence[str | Path], part_of: Mapping[str, int], settings: BuildSettings) -> RecordSet:
    """The records of one part; its sources are those of the whole. Raises `PackingError`."""

    def wanted(record: Record | Rejection) -> bool:
        if isinstance(record, Record):
            return part_of.get(record.paths[0]) == settings.part
        return record.record % settings.num_parts == settings.part  # it has no clip: any part will do, but only one

    return read_records(json_files, wanted)


def split_paths(
    file_bytes: Mapping[str, int], partners: Mapping[str, Collection[str]], num_parts: int
) -> dict[str, int]:
    """The part of each path of `file_bytes`. Its questions are packed there; its partners may be copied there."""
    names = {path: hashlib.sha256(path.encode()).hexdigest() for path in file_bytes}  # mixes data sets over the parts
    sizes = {names[path]: max(num_bytes, 1) for path, num_bytes in file_bytes.items()}
    linked = {names[path]: [names[other] for other in others] for path, others in partners.items()}
    placement = place_clips(sizes, linked, max(sum(sizes.values()) // (_PIECES_A_PART * num_parts), 1))
    # with the copies, which are decoded and stored too: clips with many partners take the longest
    pieces = [sum(sizes[name] for name in piece) for piece in placement.shards]
    num_all, part_of_piece, before = sum(pieces), [], 0
    for num_bytes in pieces:
        part_of_piece.append((2 * before + num_bytes) * num_parts // (2 * num_all))  # by the middle of the piece
        before += num_bytes
    return {path: part_of_piece[placement.home[name]] for path, name in names.items()}
