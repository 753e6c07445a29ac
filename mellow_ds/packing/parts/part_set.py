"""The parts that a merge is given: whether they are all parts of one build, each there once and whole."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mellow_ds.errors import PackingError, ShardError
from mellow_ds.packing.folder import REJECTED_NAME
from mellow_ds.packing.hash_buckets import HashBuckets
from mellow_ds.packing.packed_keys import PACKED_DTYPE, pack_keys
from mellow_ds.packing.sorted_runs import SortedRuns
from mellow_ds.shard_format import MANIFEST_NAME, Manifest, check_shard_size, read_index, read_manifest

SAMPLE_DTYPE = np.dtype(
    [
        ("key", PACKED_DTYPE),
        ("part", "<u4"),  # position among the parts
        ("shard", "<u4"),  # position in the part's manifest
        ("row", "<u4"),  # position in the shard
        ("num_questions", "<u4"),
    ]
)
_MAX_NAMED = 10  # missing parts that are named
_NUMBER_BYTES = 8  # of the number of a record, in front of its line


@dataclass(frozen=True)
class Part:
    """A finished part of a build."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str

    @property
    def number(self) -> int:
        """Which of the parts, from 0."""
        return self.manifest.sources["parts"]["part"]

    @property
    def num_parts(self) -> int:
        """How many parts the build has."""
        return self.manifest.sources["parts"]["num_parts"]


def read_parts(folders: Sequence[Path]) -> list[Part]:
    """The parts in the order of their numbers; raises `PackingError` where one is missing, twice there or foreign."""
    parts = [_read_part(folder) for folder in folders]
    if not parts:
        raise PackingError("no part is given: name the folders that `mellow-shards build --num-parts` made")
    for part in parts[1:]:
        _check_same_build(parts[0], part)
    _check_complete(parts)
    return sorted(parts, key=lambda part: part.number)


def index_parts(parts: Sequence[Part], work: Path) -> HashBuckets:
    """All samples of all parts, after a look at the sizes of the tars and the hashes and sums of the indexes.

    `work`: a folder to write into. Raises `PackingError` naming a fault.
    """
    num_samples = sum(shard.num_samples for part in parts for shard in part.manifest.shards)
    samples = HashBuckets(work, "samples", SAMPLE_DTYPE, num_samples)
    for number, part in enumerate(parts):
        try:
            for shard in range(len(part.manifest.shards)):
                samples.add(_checked_rows(part, number, shard))
        except ShardError as error:
            raise PackingError(f"{error} (part {part.number})") from None
    return samples


def _checked_rows(part: Part, number: int, shard: int) -> np.ndarray:
    """[num_samples] of a shard, as SAMPLE_DTYPE."""
    info = part.manifest.shards[shard]
    check_shard_size(part.folder, info)
    index = read_index(part.folder, info)
    if int(index["num_questions"].sum()) != info.num_questions:
        raise ShardError(f"{part.folder / info.name}: its index counts other questions than {MANIFEST_NAME}")
    rows = np.zeros(len(index), SAMPLE_DTYPE)
    rows["key"], rows["part"], rows["shard"] = pack_keys(index["key"]), number, shard
    rows["row"], rows["num_questions"] = np.arange(len(index)), index["num_questions"]
    return rows


def count_clips(parts: Sequence[Part], samples: HashBuckets) -> int:
    """Different clips of all parts; raises `PackingError` where those of a part are not as its manifest counts."""
    num_clips, of_parts = 0, np.zeros(len(parts), np.int64)
    for rows in samples.buckets():
        is_first = np.ones(len(rows), bool)
        is_first[1:] = rows["key"][1:] != rows["key"][:-1]
        num_clips += int(is_first.sum())
        is_first[1:] |= rows["part"][1:] != rows["part"][:-1]
        of_parts += np.bincount(rows["part"][is_first], minlength=len(parts))
    for part, found in zip(parts, of_parts.tolist(), strict=True):
        sums = (found, sum(shard.num_questions for shard in part.manifest.shards))
        if sums != (part.manifest.num_clips, part.manifest.num_questions):
            raise PackingError(
                f"{part.folder} has {sums[0]} clips and {sums[1]} questions; its {MANIFEST_NAME} says "
                f"{part.manifest.num_clips} and {part.manifest.num_questions}: build part {part.number} anew"
            )
    return num_clips


def add_rejected(part: Part, runs: SortedRuns) -> None:
    """Add the lines of the part's rejected.jsonl, so that they come out by file name and number (`rejected_line`).

    Raises `PackingError` where there are not as many as the part's manifest says.
    """
    path = part.folder / REJECTED_NAME
    wanted = sum(part.manifest.sources["rejected"].values())
    try:
        with path.open("rb") as file:
            num_lines = sum(1 for _ in file)
        if num_lines != wanted:
            raise PackingError(f"{path} has {num_lines} lines; wanted are {wanted}: build part {part.number} anew")
        with path.open("rb") as file:
            for line in file:
                entry = json.loads(line)
                place = entry["file"].encode() + b"\0" + entry["record"].to_bytes(_NUMBER_BYTES, "big")
                runs.add(place + line.rstrip(b"\n"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise PackingError(f"{path} cannot be read ({error}): build part {part.number} anew") from None


def rejected_line(item: bytes) -> bytes:
    """The line of an item that `add_rejected` added."""
    return item[item.index(b"\0") + 1 + _NUMBER_BYTES :]


def summed(parts: Sequence[Part], name: str) -> dict[str, int]:
    """The counts that all parts have under `name` in their sources, added up."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.manifest.sources.get(name, {}))
    return dict(sorted(counts.items()))


def _read_part(folder: Path) -> Part:
    if not folder.is_dir():
        raise PackingError(f"the part {folder} is not there: name the folders that build --part made")
    try:
        manifest = read_manifest(folder)
        payload = (folder / MANIFEST_NAME).read_bytes()
    except (ShardError, OSError) as error:
        raise PackingError(f"{error}; build this part to its end first") from None
    place = manifest.sources.get("parts")
    if not isinstance(place, dict) or not isinstance(place.get("part"), int):
        raise PackingError(
            f"{folder} is not a part of a build: give the folders that `mellow-shards build --num-parts` made"
        )
    return Part(folder, manifest, hashlib.sha256(payload).hexdigest())


def _check_same_build(first: Part, other: Part) -> None:
    ours, theirs = _identity(first), _identity(other)
    differing = [name for name, value in ours.items() if theirs[name] != value]
    if differing:
        raise PackingError(
            f"{first.folder} and {other.folder} are parts of different builds: they differ in {', '.join(differing)}; "
            "give the parts of one build, or build those that differ anew"
        )


def _identity(part: Part) -> dict[str, Any]:
    """What all parts of a build have in common, by the name that a message calls it."""
    sources = part.manifest.sources
    return {
        "--num-parts": part.num_parts,
        "JSON files": sources.get("json"),
        "audio files": (sources.get("audio") or {}).get("listing"),
        "--sample-rate": part.manifest.sample_rate,
        "--codec": part.manifest.codec,
        "--shard-megabytes": sources.get("shard_megabytes"),
        "--drop-list": sources.get("drop_list"),
        "the program's version": sources.get("tool"),
    }


def _check_complete(parts: Sequence[Part]) -> None:
    folders: dict[int, Path] = {}
    for part in parts:
        if part.number in folders:
            raise PackingError(
                f"part {part.number} of {part.num_parts} is there twice, in {folders[part.number]} and {part.folder}: "
                "give it once"
            )
        folders[part.number] = part.folder
    num_parts = parts[0].num_parts
    missing = [number for number in range(num_parts) if number not in folders]
    if missing:
        named = ", ".join(map(str, missing[:_MAX_NAMED])) + (", ..." if len(missing) > _MAX_NAMED else "")
        raise PackingError(
            f"{len(missing)} of {num_parts} parts are missing: {named}; build each with --num-parts {num_parts} "
            "--part NUMBER, and give all folders"
        )
