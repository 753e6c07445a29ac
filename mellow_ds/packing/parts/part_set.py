"""The parts that a merge is given: whether they are all parts of one build, each there once and whole."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellow_ds.errors import PackingError, ShardError
from mellow_ds.packing.folder import REJECTED_NAME
from mellow_ds.shard_format import MANIFEST_NAME, Manifest, check_shard_size, read_index, read_manifest

_MAX_NAMED = 10  # missing parts that are named


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


def check_part(part: Part) -> None:
    """Sizes of the tars, hashes and sums of the indexes; raises `PackingError` naming a fault."""
    keys: set[bytes] = set()
    try:
        for shard in part.manifest.shards:
            check_shard_size(part.folder, shard)
            rows = read_index(part.folder, shard)
            keys.update(rows["key"].tolist())
            if int(rows["num_questions"].sum()) != shard.num_questions:
                raise ShardError(f"{part.folder / shard.name}: its index counts other questions than {MANIFEST_NAME}")
    except ShardError as error:
        raise PackingError(f"{error} (part {part.number})") from None
    sums = (len(keys), sum(shard.num_questions for shard in part.manifest.shards))
    if sums != (part.manifest.num_clips, part.manifest.num_questions):
        raise PackingError(
            f"{part.folder} has {sums[0]} clips and {sums[1]} questions; its {MANIFEST_NAME} says "
            f"{part.manifest.num_clips} and {part.manifest.num_questions}: build part {part.number} anew"
        )


def rejected_lines(part: Part) -> list[str]:
    """The lines of the part's rejected.jsonl; `PackingError` where there are not as many as its manifest says."""
    path = part.folder / REJECTED_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise PackingError(f"{path} cannot be read ({error}): build part {part.number} anew") from None
    wanted = sum(part.manifest.sources["rejected"].values())
    if len(lines) != wanted:
        raise PackingError(f"{path} has {len(lines)} lines; wanted are {wanted}: build part {part.number} anew")
    return lines


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
