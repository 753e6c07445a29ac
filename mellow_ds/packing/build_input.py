"""What a build is given, read and described: records, audio files, settings, drop list; the whole or one part of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mellow_ds
from mellow_ds.errors import PackingError
from mellow_ds.packing.drop_list import DropList, read_drop_list
from mellow_ds.packing.parts.split import read_graph, read_part, split_paths
from mellow_ds.packing.records import RecordSet, read_records
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.survey import Listing, list_sources
from mellow_ds.shard_format import Manifest


@dataclass(frozen=True)
class BuildInput:
    """What is to be packed, and how."""

    records: RecordSet  # of the part; its sources are those of the whole
    listing: Listing  # of all audio files, those of the other parts too
    drop_list: DropList
    audio_root: Path
    settings: BuildSettings

    @property
    def paths(self) -> list[str]:
        """The audio files of the records."""
        return sorted({path for record in self.records.records for path in record.paths})


def read_input(json_files: Sequence[str | Path], audio_root: Path, settings: BuildSettings) -> BuildInput:
    """Read records and drop list and ask for the sizes of the audio files. Raises `PackingError`."""
    drop_list = read_drop_list(settings.drop_list)
    if not settings.num_parts:
        records = read_records(json_files)
        paths = {path for record in records.records for path in record.paths}
        return BuildInput(
            records, list_sources(audio_root, paths, settings.num_workers), drop_list, audio_root, settings
        )
    graph, whole = read_graph(json_files)
    listing = list_sources(audio_root, graph.paths, settings.num_workers)
    records = read_part(json_files, split_paths(listing.file_bytes, graph.partners, settings.num_parts), settings)
    if records.sources != whole.sources:
        raise PackingError(f"{', '.join(map(str, json_files))}: changed while it was read: start the build again")
    return BuildInput(records, listing, drop_list, audio_root, settings)


def describe_sources(given: BuildInput) -> dict[str, Any]:
    """What the manifest says that it was built from. Nothing of this machine or hour: equal builds are equal."""
    sources: dict[str, Any] = {
        "tool": f"mellow-ds {mellow_ds.__version__}",
        "json": [asdict(source) for source in given.records.sources],
        "audio": {"listing": given.listing.sha256},
        "shard_megabytes": given.settings.shard_megabytes,
    }
    if given.drop_list.sha256:
        sources["drop_list"] = given.drop_list.sha256
    if given.settings.num_parts:
        sources["parts"] = {"part": given.settings.part, "num_parts": given.settings.num_parts}
    return sources


def differences(given: BuildInput, manifest: Manifest, sources: dict[str, Any]) -> list[str]:
    """What sets the build of `manifest` apart from the one that is asked for, as far as `sources` knows yet."""
    built, wanted = manifest.sources, sources["audio"]
    built_audio = built.get("audio") or {}
    compared = {
        "JSON files": built.get("json") != sources["json"],
        "audio files": any(built_audio.get(name) != wanted[name] for name in wanted),
        "--sample-rate": manifest.sample_rate != given.settings.sample_rate,
        "--codec": manifest.codec != given.settings.codec,
        "--shard-megabytes": built.get("shard_megabytes") != given.settings.shard_megabytes,
        "--drop-list": built.get("drop_list") != sources.get("drop_list"),
        "--num-parts": built.get("parts") != sources.get("parts"),
    }
    return [name for name, differs in compared.items() if differs]
