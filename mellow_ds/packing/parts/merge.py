"""Join the parts of a build into one shard folder: the questions and clips of one build, though not its bytes.

The shards keep their content and get new names; nothing is decoded. They are linked or copied into a work folder, then
published as a build's are: the manifest comes last, so a merge that was killed is started again and goes on. However
many clips, questions and rejected records the parts have, only a bounded number of them is in memory.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mellow_ds.errors import PackingError, ShardError
from mellow_ds.packing.folder import REJECTED_NAME, OutputFolder
from mellow_ds.packing.parts.part_set import (
    Part,
    add_rejected,
    count_clips,
    index_parts,
    read_parts,
    rejected_line,
    summed,
)
from mellow_ds.packing.parts.shard_copy import IdChanges, copy_shard, link_shard, rewrite_ids
from mellow_ds.packing.parts.twins import Renamings, check_samples, find_twins
from mellow_ds.packing.report import Report, check_rejected_share
from mellow_ds.packing.settings import MergeSettings
from mellow_ds.packing.shard_plan import shard_name
from mellow_ds.packing.sorted_runs import SortedRuns
from mellow_ds.shard_format import MANIFEST_NAME, Manifest, ShardInfo, index_name, read_manifest

_NOTHING: tuple[tuple[int, int] | None, Iterator[tuple[int, IdChanges]]] = (None, iter(()))


def run_merge(parts: Sequence[str | Path], out: str | Path, settings: MergeSettings) -> Report:
    """Join the finished parts in the folders `parts` into the folder `out`.

    Raises `PackingError` where a part is missing, twice there, foreign or damaged, where too many records were left
    out, or where `out` holds something else; `FaultError` for a full disk.
    """
    started = time.monotonic()
    paths = [Path(part) for part in parts]
    if Path(out).resolve() in {path.resolve() for path in paths}:
        raise PackingError(f"--out {out} is one of the parts: give another --out")
    folder = OutputFolder(Path(out))
    with folder.locked():
        finished = _finished_before(folder, paths)
        manifest = finished or _merge(read_parts(paths), folder, settings)
        _check_rejected(manifest.sources, settings, folder.path / REJECTED_NAME)
        folder.remove_work()
        if settings.method == "move":
            for path in paths:
                _remove_part(path)
        num_reused = len(manifest.shards) if finished else 0
        return Report(folder.path, manifest, time.monotonic() - started, finished is not None, num_reused)


def _finished_before(folder: OutputFolder, paths: Sequence[Path]) -> Manifest | None:
    """The manifest of a merge of the same parts, some of which it may have moved away; None where there is none."""
    try:
        manifest = folder.finished_manifest()
    except ShardError:
        return None
    merged = (manifest.sources.get("parts") or {}).get("manifests") if manifest is not None else None
    if merged is None or len(merged) != len(paths):
        return None
    there = [path / MANIFEST_NAME for path in paths if (path / MANIFEST_NAME).is_file()]
    return manifest if all(_sha256(path) in merged for path in there) else None


def _merge(parts: list[Part], folder: OutputFolder, settings: MergeSettings) -> Manifest:
    if not settings.overwrite:
        _refuse_other(folder)
    sources = _joined_sources(parts)
    num_shards = sum(len(part.manifest.shards) for part in parts)
    folder.start_work()
    try:
        _check_rejected(sources, settings, _join_rejected(parts, folder))
        samples = index_parts(parts, folder.work)
        num_clips = count_clips(parts, samples)
        with _progress(settings, num_shards, "checking") as bar:
            check_samples(parts, bar)
        renamings = find_twins(parts, samples, folder.work)
        with _progress(settings, num_shards, "joining") as bar:
            shards = _bring_shards(parts, renamings, folder, settings.method, bar)
        manifest = _joined_manifest(parts, shards, sources, num_clips)
        folder.publish(shards, manifest)
    finally:
        folder.end_work()
    return manifest


def _join_rejected(parts: Sequence[Part], folder: OutputFolder) -> Path:
    """The rejected.jsonl of all parts, which is returned."""
    runs = SortedRuns(folder.work, "rejected")
    for part in parts:
        add_rejected(part, runs)
    path = folder.write_rejected(map(rejected_line, runs.merged()))
    runs.remove()
    return path


def _refuse_other(folder: OutputFolder) -> None:
    folder.check_unclaimed()
    try:
        manifest = folder.finished_manifest()
    except ShardError as error:
        raise PackingError(f"{error}; or give another --out, or --overwrite to replace it") from None
    if manifest is not None:
        raise PackingError(
            f"{folder.path} holds a finished build of something else: give another --out, or --overwrite to replace it"
        )


def _check_rejected(sources: dict[str, Any], settings: MergeSettings, path: Path) -> None:
    num_records = sum(source["num_records"] for source in sources["json"])
    check_rejected_share(sources["rejected"], num_records, settings.max_rejected, path)


def _joined_sources(parts: Sequence[Part]) -> dict[str, Any]:
    """As one build would describe them, but for the contents of the audio files, which each part knows of its own."""
    sources = {**parts[0].manifest.sources, "rejected": summed(parts, "rejected")}
    sources["audio"] = {"listing": sources["audio"]["listing"]}
    sources["parts"] = {"num_parts": len(parts), "manifests": [part.manifest_sha256 for part in parts]}
    if "drop_list" in sources:
        sources["dropped"] = summed(parts, "dropped")
    return sources


def _bring_shards(
    parts: Sequence[Part], renamings: Renamings, folder: OutputFolder, method: str, bar: Any
) -> tuple[ShardInfo, ...]:
    """All shards of all parts in the work folder, under their final names."""
    to_rename = renamings.by_shard()
    place, changes = next(to_rename, _NOTHING)
    shards: list[ShardInfo] = []
    for number, part in enumerate(parts):
        for shard, info in enumerate(part.manifest.shards):
            name = shard_name(len(shards))
            if place == (number, shard):
                shards.append(rewrite_ids(part.folder, info, folder.work, name, changes))
                place, changes = next(to_rename, _NOTHING)
            else:
                bring = copy_shard if method == "copy" else link_shard
                shards.append(bring(part.folder, info, folder.work, name))
            bar.update()
    return tuple(shards)


def _joined_manifest(
    parts: Sequence[Part], shards: tuple[ShardInfo, ...], sources: dict[str, Any], num_clips: int
) -> Manifest:
    subtypes: Counter[str] = Counter()
    for part in parts:
        subtypes.update(part.manifest.subtypes)
    return Manifest(
        sample_rate=parts[0].manifest.sample_rate,
        codec=parts[0].manifest.codec,
        num_clips=num_clips,
        num_questions=sum(part.manifest.num_questions for part in parts),
        subtypes=dict(sorted(subtypes.items())),
        shards=shards,
        sources=sources,
    )


def _remove_part(folder: Path) -> None:
    """Remove the files of a part that has been merged, its manifest last; what is not the part's stays."""
    with suppress(ShardError):  # its manifest has gone before
        for shard in read_manifest(folder).shards:
            (folder / shard.name).unlink(missing_ok=True)
            (folder / index_name(shard.name)).unlink(missing_ok=True)
        (folder / REJECTED_NAME).unlink(missing_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    with suppress(OSError):  # something else lies in it
        folder.rmdir()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _progress(settings: MergeSettings, total: int, verb: str) -> Any:
    # disable=None: no bar where stderr is not a terminal
    return tqdm(total=total, desc=verb, unit="shard", disable=None if settings.progress else True)
