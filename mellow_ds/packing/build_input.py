"""What a build is given, read and described: records, audio files, settings, drop list; the whole or one part of it."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mellow_ds
from mellow_ds.errors import PackingError
from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.drop_list import DropList, read_drop_list
from mellow_ds.packing.parts.split import PartShare, PathGraph, share_of_part
from mellow_ds.packing.question_set import JsonChanged, QuestionSet, gather_questions
from mellow_ds.packing.record_file import RecordFile
from mellow_ds.packing.records import JsonSource, Record, RecordStream, Rejection
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.survey import Listing, Survey, list_sources
from mellow_ds.shard_format import Manifest


@dataclass(frozen=True)
class BuildInput:
    """What is to be packed, and how."""

    records: RecordStream  # of the whole, walked through once, so that its sources are known
    written: RecordFile | None  # the same records, where they were written down
    sources: tuple[JsonSource, ...]
    catalogue: Catalogue  # of all audio files, those of the other parts too
    listing: Listing
    share: PartShare | None  # where the build is one part
    drop_list: DropList
    audio_root: Path
    settings: BuildSettings

    @property
    def num_records(self) -> int:
        """All records of all parts, rejected ones included."""
        return sum(source.num_records for source in self.sources)

    @property
    def wanted_files(self) -> np.ndarray | None:
        """[num_paths] which of the audio files the build packs; None: all."""
        return self.share.files if self.share is not None else None

    def read_again(self, survey: Survey, work: Path) -> QuestionSet:
        """The questions of the records; raises `PackingError` where these are no longer what they were."""
        records: Iterable[Record | Rejection] = self.records if self.written is None else self.written
        if self.share is not None:
            records = self.share.records(records, self.catalogue)
        try:
            found = gather_questions(records, self.records.names, self.catalogue, survey, work, self.drop_list)
            if self.records.sources == self.sources:
                return found
        except JsonChanged:
            pass
        names = ", ".join(source.name for source in self.sources)
        raise PackingError(f"{names}: changed while it was read: start the build again")


def read_input(
    json_files: Sequence[str | Path],
    audio_root: Path,
    settings: BuildSettings,
    catalogue: Catalogue,
    written: RecordFile | None = None,
) -> BuildInput:
    """Read the records, for their audio files, and the drop list, and ask for the sizes. Raises `PackingError`.

    The records are added to `written`; without it they are read from the JSON files again when their turn comes.
    """
    drop_list = read_drop_list(settings.drop_list)
    records, graph = RecordStream(json_files), PathGraph()
    with written or nullcontext():
        for record in records:
            if isinstance(record, Record):
                numbers = tuple(map(catalogue.number_of, record.paths))
                if settings.num_parts:
                    graph.add(numbers)
            if written is not None:
                written.add(record)
    listing = list_sources(audio_root, catalogue, settings.num_workers)
    share = share_of_part(graph, listing.file_bytes, catalogue, settings) if settings.num_parts else None
    return BuildInput(records, written, records.sources, catalogue, listing, share, drop_list, audio_root, settings)


def describe_sources(given: BuildInput) -> dict[str, Any]:
    """What the manifest says that it was built from. Nothing of this machine or hour: equal builds are equal."""
    sources: dict[str, Any] = {
        "tool": f"mellow-ds {mellow_ds.__version__}",
        "json": [asdict(source) for source in given.sources],
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
