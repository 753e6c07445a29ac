"""The records that a build leaves out: counted by reason, and sorted for rejected.jsonl without holding them."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec.structs import asdict

from mellow_ds.packing.records import Rejection
from mellow_ds.packing.sorted_runs import SortedRuns

_NUMBER_BYTES = 8


class Rejections:
    """Rejected records, each once."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        """`files`: the names of the JSON files; `folder` is for what memory should not hold."""
        self.counts: Counter[str] = Counter()  # by reason
        self._runs = SortedRuns(folder, "rejected")
        self._rank = {name: rank.to_bytes(_NUMBER_BYTES, "big") for rank, name in enumerate(sorted(files))}

    def add(self, rejection: Rejection) -> None:
        """Take one in. Raises `OSError` where the disk is full."""
        self.counts[rejection.reason] += 1
        place = self._rank[rejection.file] + rejection.record.to_bytes(_NUMBER_BYTES, "big")
        self._runs.add(place + json.dumps(asdict(rejection)).encode())

    def lines(self) -> Iterator[bytes]:
        """A line of JSON for each so far, by file name and number."""
        for item in self._runs.merged():
            yield item[2 * _NUMBER_BYTES :]
