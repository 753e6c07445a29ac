"""Rows by hash: all come back, those of one hash together and in their order, in buckets of a bounded size."""

import random
from pathlib import Path

import numpy as np
import pytest

from mellow_ds.packing.hash_buckets import HashBuckets

DTYPE = np.dtype([("key", "S16"), ("number", "<u4")])


@pytest.mark.parametrize(("count", "bucket_bytes"), [(0, 1_000), (10, 1 << 20), (3_000, 1_000), (3_000, 20_000)])
def test_rows_of_a_hash_come_together(tmp_path: Path, count: int, bucket_bytes: int) -> None:
    draw = random.Random(0)
    hashes = [draw.randbytes(14) + b"\0\0" for _ in range(count // 2)]
    rows = np.array([(draw.choice(hashes), number) for number in range(count)], dtype=DTYPE)
    buckets = HashBuckets(tmp_path, "rows", DTYPE, count, bucket_bytes)
    for start in range(0, count, 70):
        buckets.add(rows[start : start + 70])
    for _ in range(2):  # may be asked for again
        found = list(buckets.buckets())
        assert max(bucket.nbytes for bucket in found) <= 2 * bucket_bytes
        joined = np.concatenate(found)
        assert joined.tolist() == rows[np.lexsort((rows["number"], rows["key"]))].tolist()
    assert bool(list(tmp_path.iterdir())) == (count * DTYPE.itemsize >= bucket_bytes)
    buckets.remove()
    assert list(tmp_path.iterdir()) == []
