"""Damage to shards, as disks and interrupted copies do it."""

import os
import tarfile
from pathlib import Path


def sample_keys(shard: Path) -> list[str]:
    """Keys of the samples of a tar, in the order of storage."""
    with tarfile.open(shard) as tar:
        return [name.removesuffix(".flac") for name in tar.getnames() if name.endswith(".flac")]


def damage_audio(shard: Path, key: str) -> None:
    """Flip a bit in the audio of a sample."""
    with tarfile.open(shard) as tar:
        member = tar.getmember(f"{key}.flac")
    with shard.open("r+b") as file:
        file.seek(member.offset_data + member.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
