"""Samples into one shard: a tar that plain webdataset reads, its index, and what the manifest says of the two.

What the payload of a sample is, audio or features, is the caller's.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mellow_ds.shard_format import INDEX_DTYPE, SampleInfo, ShardInfo, index_name, sample_checksum

_OWNER = "mellow"  # fixed, like times and modes: the same input gives the same bytes


def write_samples(
    folder: Path, name: str, extension: str, samples: Iterable[tuple[SampleInfo, bytes]], num_samples: int
) -> ShardInfo:
    """Write the tar `name` and its index into `folder`, each whole or not at all.

    `samples` are `num_samples` pairs of a sample's JSON and the payload of its member `KEY.extension`; they are written
    as they come, one at a time in memory. Raises `OSError` where writing fails.
    """
    rows = np.zeros(num_samples, dtype=INDEX_DTYPE)
    with published(folder / name) as file:
        hashing = _HashingFile(file)
        _write_members(hashing, extension, samples, rows)
        file.flush()
        _fill_offsets(rows, Path(file.name), extension)
    index = io.BytesIO()
    np.save(index, rows, allow_pickle=False)
    with published(folder / index_name(name)) as file:
        file.write(index.getvalue())
    return ShardInfo(
        name=name,
        num_bytes=hashing.num_bytes,
        sha256=hashing.digest.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
        num_samples=num_samples,
        num_questions=int(rows["num_questions"].sum()),
    )


@contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` whole and synced, or not at all."""
    # the process id keeps apart a worker of a killed build that has not yet noticed
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_members(
    file: "_HashingFile", extension: str, samples: Iterable[tuple[SampleInfo, bytes]], rows: np.ndarray
) -> None:
    """KEY.extension and KEY.json for each sample; fills all of `rows` but the offsets."""
    from webdataset import TarWriter  # imports torch

    with TarWriter(file, user=_OWNER, group=_OWNER, mode=0o644, mtime=0, encoder=False) as tar:
        for row, (info, payload) in zip(rows, samples, strict=True):
            text = info.to_json()
            # one call a member: TarWriter sorts the members of a call, and .json would come before .wav
            tar.write({"__key__": info.key, extension: payload})
            tar.write({"__key__": info.key, "json": text})
            row["key"] = info.key.encode()
            row["audio_bytes"], row["json_bytes"] = len(payload), len(text)
            row["checksum"] = sample_checksum(payload, text)
            row["num_frames"], row["num_questions"] = info.num_frames, len(info.questions)


def _fill_offsets(rows: np.ndarray, tar_path: Path, extension: str) -> None:
    """Read back from the tar where the payloads are."""
    with tarfile.open(tar_path, "r:") as tar:
        for row in rows:
            key = row["key"].decode()
            for name, size, field in (
                (f"{key}.{extension}", row["audio_bytes"], "audio_offset"),
                (f"{key}.json", row["json_bytes"], "json_offset"),
            ):
                member = tar.next()
                assert member is not None, f"{tar_path} ends before {name}"
                assert (member.name, member.size) == (name, size), f"{tar_path} holds {member.name} in place of {name}"
                row[field] = member.offset_data


class _HashingFile:
    """Passes writes on and keeps their hash and number."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)
