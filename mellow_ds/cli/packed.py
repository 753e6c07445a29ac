"""A run that has JSON and a folder of audio but no shards: they are packed first, once, into the cache of this node."""

import dataclasses
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mellow_ds.config.schema import RunConfig
from mellow_ds.errors import ConfigError
from mellow_ds.shard_format import MANIFEST_NAME
from mellow_ds.world import World

_log = logging.getLogger("mellow_ds.cli")


def needs_packing(config: RunConfig) -> bool:
    """Whether the run names JSON files and audio, and no shards for what it does."""
    if config.data.train_shards or (config.mode != "train" and config.data.eval_shards):
        return False
    return bool(config.data.datafiles and config.data.datapath)


def check_files(config: RunConfig) -> None:
    """Raise `ConfigError` where what is to be packed is not there."""
    for file in config.data.datafiles:
        if not Path(file).is_file():
            raise ConfigError(f"data.datafiles names {file}, which is not there: correct it, or give data.shards")
    if not Path(config.data.datapath).is_dir():
        raise ConfigError(f"data.datapath {config.data.datapath} is not a folder: name the one that the audio is in")


def with_packed_shards(config: RunConfig, world: World) -> RunConfig:
    """The configuration with data.shards, packed now where they are not in the cache yet.

    Every rank calls it; the first of a node to get the lock packs, the others wait for it and find the work done. A
    rank that dies gives the lock back. Raises `PackingError` as a build does.
    """
    from mellow_ds.packing.build import run_build
    from mellow_ds.packing.settings import BuildSettings

    folder = _cache_folder(config) / _name(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if world.local_rank == 0:
        is_there = (folder / MANIFEST_NAME).is_file()
        what = "data.datafiles are packed already, in" if is_there else "packing data.datafiles first, once, into"
        _log.info("data.shards is empty: %s %s", what, folder)
    with _alone(folder.with_name(f"{folder.name}.lock")):
        settings = BuildSettings(sample_rate=config.data.sampling_rate, progress=world.local_rank == 0)
        report = run_build(config.data.datafiles, config.data.datapath, folder, settings)
    if world.local_rank == 0:
        _log.info("%d clips, %d questions", report.manifest.num_clips, report.manifest.num_questions)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards=(str(folder),)))


def _cache_folder(config: RunConfig) -> Path:
    from mellow_ds.data.shard_cache import default_cache_folder

    return (Path(config.data.cache_folder) if config.data.cache_folder else default_cache_folder().parent) / "packed"


def _name(config: RunConfig) -> str:
    """Another folder for other questions, another audio folder or another rate."""
    from mellow_ds.packing.parts.shard_copy import file_sha256

    digest = hashlib.sha256(f"{Path(config.data.datapath).resolve()} {config.data.sampling_rate}".encode())
    for file in config.data.datafiles:
        digest.update(bytes.fromhex(file_sha256(Path(file))))
    return f"{Path(config.data.datafiles[0]).stem}-{digest.hexdigest()[:12]}"


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process of this node is in here."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
