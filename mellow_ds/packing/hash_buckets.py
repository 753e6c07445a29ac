"""Rows with a hash in front, more than memory holds: spread over files by the hash, so that each file can be sorted.

Rows of one hash come together in one bucket. Scratch, like all that a build keeps beside its shards.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

_BUCKET_BYTES = 1 << 24
_PREFIX_BITS = 16  # of the hash, that decide about the bucket


class HashBuckets:
    """Rows of a structured dtype whose first field is `key`, S16: hashes, so evenly spread."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype, num_rows: int, bucket_bytes: int = _BUCKET_BYTES
    ) -> None:
        """`num_rows`: about how many will come; files are `folder/name-0.part` and so on, of about `bucket_bytes`."""
        self._paths = [
            folder / f"{name}-{number}.part" for number in range(1 + num_rows * dtype.itemsize // bucket_bytes)
        ]
        self._dtype, self._bucket_bytes = dtype, bucket_bytes
        self._new: list[np.ndarray] = []
        self._new_bytes = 0

    def add(self, rows: np.ndarray) -> None:
        """Take in rows. Raises `OSError` where they cannot be written."""
        self._new.append(rows)
        self._new_bytes += rows.nbytes
        if self._new_bytes >= self._bucket_bytes:
            for path, part in zip(self._paths, self._spread(), strict=True):
                with path.open("ab") as file:
                    file.write(part.tobytes())
            self._new, self._new_bytes = [], 0

    def buckets(self) -> Iterator[np.ndarray]:
        """All rows, a bucket at a time, sorted by key and otherwise in the order of their coming."""
        for path, late in zip(self._paths, self._spread(), strict=True):
            early = np.fromfile(path, dtype=self._dtype) if path.exists() else np.zeros(0, self._dtype)
            rows = np.concatenate([early, late])
            yield rows[np.argsort(rows["key"], kind="stable")]

    def remove(self) -> None:
        """Remove the files."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _spread(self) -> list[np.ndarray]:
        """The rows that are still in memory, by bucket."""
        rows = np.concatenate([np.zeros(0, self._dtype), *self._new])
        prefixes = np.ndarray(len(rows), ">u2", rows.tobytes(), strides=self._dtype.itemsize)  # the key comes first
        numbers = prefixes.astype(np.int64) * len(self._paths) >> _PREFIX_BITS
        order = np.argsort(numbers, kind="stable")
        return np.split(rows[order], np.searchsorted(numbers[order], np.arange(1, len(self._paths))))
