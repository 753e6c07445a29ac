"""Bring a finished shard into another folder under another name: as a second name of the same file, or as a copy."""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mellow_ds.errors import PackingError
from mellow_ds.packing.shard_file import published
from mellow_ds.shard_format import ShardInfo, index_name, read_index, sample_checksum

IdChanges = list[tuple[str, str]]  # (old, new) ids of questions
_BLOCK_BYTES = 1 << 20


def link_shard(folder: Path, info: ShardInfo, target: Path, name: str) -> ShardInfo:
    """Hard links to tar and index in the folder `target`; copies where the file system has no such links."""
    for old, new in ((info.name, name), (index_name(info.name), index_name(name))):
        (target / new).unlink(missing_ok=True)
        try:
            (target / new).hardlink_to(folder / old)
        except OSError:  # another disk, or a file system without
            return copy_shard(folder, info, target, name)
    return replace(info, name=name)


def copy_shard(folder: Path, info: ShardInfo, target: Path, name: str) -> ShardInfo:
    """Copy tar and index and compare their hashes; what an interrupted run has copied whole is kept.

    Raises `PackingError` where a file is not the one that the manifest names.
    """
    _copy(folder / info.name, target / name, info.sha256)
    _copy(folder / index_name(info.name), target / index_name(name), info.index_sha256)
    return replace(info, name=name)


def _copy(source: Path, target: Path, sha256: str) -> None:
    if target.is_file() and file_sha256(target) == sha256:
        return
    digest = hashlib.sha256()
    with published(target) as copy, source.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
        if digest.hexdigest() != sha256:
            raise PackingError(f"{source} is not the file that its manifest names (SHA-256 differs): build it anew")


def rewrite_ids(
    folder: Path, info: ShardInfo, target: Path, name: str, new_ids: Iterable[tuple[int, IdChanges]]
) -> ShardInfo:
    """Copy a shard with other question ids: `new_ids` are by the row of the sample in the index.

    Ids have one length, so every offset stays; checksums, index and hashes are made anew.
    """
    rows = read_index(folder, info).copy()
    with published(target / name) as copy:
        with (folder / info.name).open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                copy.write(block)
            for number, changes in new_ids:
                row = rows[number]
                file.seek(int(row["audio_offset"]))
                audio = file.read(int(row["audio_bytes"]))
                file.seek(int(row["json_offset"]))
                text = _replace_ids(file.read(int(row["json_bytes"])), changes)
                copy.seek(int(row["json_offset"]))
                copy.write(text)
                row["checksum"] = sample_checksum(audio, text)
        copy.flush()
        sha256 = file_sha256(Path(copy.name))
    index = io.BytesIO()
    np.save(index, rows, allow_pickle=False)
    with published(target / index_name(name)) as copy:
        copy.write(index.getvalue())
    return replace(info, name=name, sha256=sha256, index_sha256=hashlib.sha256(index.getvalue()).hexdigest())


def _replace_ids(text: bytes, changes: IdChanges) -> bytes:
    for old, new in changes:
        # quotes within a JSON string are escaped, so this can stand nowhere else
        before, after = f'"id":"{old}"'.encode(), f'"id":"{new}"'.encode()
        assert text.count(before) == 1, f"question {old} does not stand where it was found"
        text = text.replace(before, after)
    return text


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
