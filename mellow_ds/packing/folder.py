"""The folder that a build writes into: lock, work in progress, publishing, and what a finished build there means.

Shards are made in a subfolder and moved up when all are done; the manifest comes last. So a folder with a manifest is
whole, a build that fails leaves an earlier one as it was, and a killed build goes on from the shards that have a note.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mellow_ds.errors import FaultError, PackingError, ShardError
from mellow_ds.packing.parts.shard_copy import file_sha256
from mellow_ds.packing.shard_file import published
from mellow_ds.packing.shard_plan import shard_name
from mellow_ds.packing.write import ShardNote, note_path, read_note
from mellow_ds.shard_format import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    check_shard_size,
    index_name,
    read_manifest,
)

REJECTED_NAME = "rejected.jsonl"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # some NFS
_log = logging.getLogger("mellow_ds.packing")
_WORK_NAME = ".build"
_SHARD_PATTERN = re.compile(r"shard-\d{6,}\.(tar|index\.npy)")


class OutputFolder:
    """The --out folder of a build."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / _WORK_NAME
        self.manifest_path = path / MANIFEST_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other builds out; says in one line what hinders writing.

        What was made and is still empty in the end is removed, so that a mistake leaves nothing behind.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with self._explain_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
            try:
                self._lock(handle)
                yield
            finally:
                os.close(handle)
                with suppress(OSError):  # not empty
                    for folder in made:
                        folder.rmdir()

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PackingError(
                f"another build is writing into {self.path}: wait for it, or give another --out"
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            _log.warning("%s is on a file system without locks: see that no other build writes into it", self.path)

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FaultError(
                    f"disk full while packing into {self.path}: free some space or give another --out, and start the "
                    "same command again; finished shards are kept"
                ) from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise PackingError(f"{self.path} cannot be written ({error.strerror}): give another --out") from None
            raise FaultError(f"packing into {self.path} failed ({error}): start the same command again") from None

    def check_unclaimed(self) -> None:
        """Raise `PackingError` where tars lie here that no build of ours accounts for."""
        foreign = self._shard_files()
        if foreign and not self.manifest_path.exists() and not self.work.exists():
            raise PackingError(
                f"{self.path} holds {foreign[0].name} but neither a {MANIFEST_NAME} nor a build in progress: "
                "give another --out, or --overwrite"
            )

    def start_work(self) -> None:
        """Make the subfolder for work in progress, without what a killed worker left half written."""
        self.work.mkdir(exist_ok=True)
        self._remove_parts()

    def end_work(self) -> None:
        """Remove what only this run needed; finished shards stay for the next."""
        self._remove_parts()
        with suppress(OSError):  # not empty, or not there
            self.work.rmdir()

    def _remove_parts(self) -> None:
        for pattern in (f"{_WORK_NAME}/*.part", f"{MANIFEST_NAME}.*.part", f"{REJECTED_NAME}.*.part"):
            for part in self.path.glob(pattern):
                part.unlink(missing_ok=True)

    def finished_note(self, name: str, fingerprint: str) -> ShardNote | None:
        """The note of a shard that a killed build finished from the same input; None where it must be made."""
        note = read_note(self.work, name)
        if note is None or note.fingerprint != fingerprint:
            note_path(self.work, name).unlink(missing_ok=True)
            return None
        if note.info is None or all(self._is_whole(*file) for file in _files_of(note.info)):
            return note
        return None

    def _is_whole(self, name: str, sha256: str) -> bool:
        # synced before it was renamed, so a file that is there is whole; the hash is against another in its place
        path = self.work / name
        return path.is_file() and file_sha256(path) == sha256

    def write_rejected(self, lines: Iterable[bytes]) -> Path:
        """Write rejected.jsonl, also where nothing is rejected."""
        path = self.path / REJECTED_NAME
        with published(path) as file:
            for line in lines:
                file.write(line + b"\n")
        return path

    def publish(self, made: Sequence[ShardInfo], manifest: Manifest) -> None:
        """Move the shards `made` up under the names that `manifest` has for them, and write it last."""
        self.manifest_path.unlink(missing_ok=True)
        for old in self._shard_files():
            old.unlink()
        for info, final in zip(made, manifest.shards, strict=True):
            _move_up(self.work / info.name, self.path / final.name)
            _move_up(self.work / index_name(info.name), self.path / index_name(final.name))
        _sync_folder(self.path)
        with published(self.manifest_path) as file:
            file.write(manifest.to_json().encode())
        _sync_folder(self.path)
        self.remove_work()

    def remove_work(self) -> None:
        """Remove what a finished build no longer needs."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finished_manifest(self) -> Manifest | None:
        """The manifest of a finished build whose files are all there; None where there is none."""
        if not self.manifest_path.exists():
            return None
        manifest = read_manifest(self.path)
        try:
            for shard in manifest.shards:
                check_shard_size(self.path, shard)
                if not (self.path / index_name(shard.name)).is_file():
                    return None
        except ShardError:
            return None
        return manifest

    def _shard_files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if _SHARD_PATTERN.fullmatch(path.name))


def renumbered(notes: list[ShardNote]) -> tuple[ShardInfo, ...]:
    """The shards under their final names, without gaps for those that came out empty."""
    made = [note.info for note in notes if note.info is not None]
    return tuple(replace(info, name=shard_name(number)) for number, info in enumerate(made))


def _files_of(info: ShardInfo) -> tuple[tuple[str, str], tuple[str, str]]:
    return (info.name, info.sha256), (index_name(info.name), info.index_sha256)


def _move_up(path: Path, final: Path) -> None:
    """A second name where the file system has such, so that a build killed right here still finds all its shards."""
    try:
        final.hardlink_to(path)
    except OSError:
        path.replace(final)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
