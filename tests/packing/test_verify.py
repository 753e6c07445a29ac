"""Verification: every kind of damage is found and named, and a sound folder has none."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellow_ds.errors import ShardError
from mellow_ds.packing.build import build_shards
from mellow_ds.packing.verify import verify_shards
from mellow_ds.shard_format import MANIFEST_NAME, index_name, read_index, read_manifest

TAR = "shard-000000.tar"


@pytest.fixture(params=["flac", "pcm"])
def shards(corpus: Any, request: pytest.FixtureRequest) -> Path:
    corpus.ask_tones(8)
    build_shards(
        [corpus.write()], corpus.root, corpus.folder / "out", workers=1, shard_megabytes=0.02, codec=request.param
    )
    return corpus.folder / "out"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def first_row(folder: Path) -> np.void:
    return read_index(folder, read_manifest(folder).shards[0])[0]


def cut_at_a_member(folder: Path) -> None:
    with tarfile.open(folder / TAR) as tar:
        offset = tar.getmembers()[2].offset
    os.truncate(folder / TAR, offset)


def forge(folder: Path, **shard_fields: Any) -> None:
    """Make the manifest fit a replaced file, so that only a look inside can tell."""
    content = json.loads((folder / MANIFEST_NAME).read_text())
    content["shards"][0].update(shard_fields)
    (folder / MANIFEST_NAME).write_text(json.dumps(content))


def forge_member_name(folder: Path) -> None:
    """Rename the first member, with a right header checksum: the sum of the header, its own field blank."""
    content = bytearray((folder / TAR).read_bytes())
    content[0] ^= 1
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (folder / TAR).write_bytes(content)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sound_folder_has_no_problem(shards: Path, workers: int) -> None:
    assert verify_shards(shards, workers) == []


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: flip(folder / TAR, int(first_row(folder)["audio_offset"]) + 60), "checksum differs"),
        (lambda folder: flip(folder / TAR, int(first_row(folder)["json_offset"]) + 5), "checksum differs"),
        (lambda folder: flip(folder / TAR, 5), "SHA-256 differs"),
        (lambda folder: flip(folder / TAR, 5), "cannot be read as a tar"),
        (lambda folder: forge_member_name(folder), "as a tar it differs from the index at"),
        (lambda folder: flip(folder / TAR, -1), "SHA-256 differs"),
        (lambda folder: os.truncate(folder / TAR, (folder / TAR).stat().st_size - 512), "bytes; the manifest says"),
        (cut_at_a_member, "the tar ends within it"),
        (lambda folder: (folder / TAR).unlink(), "cannot be read"),
        (lambda folder: (folder / index_name(TAR)).unlink(), "cannot be read"),
        (lambda folder: flip(folder / index_name(TAR), -1), "not the index that the manifest names"),
    ],
)
def test_damage_is_found_and_named(shards: Path, damage: Callable[[Path], None], named: str) -> None:
    damage(shards)
    problems = verify_shards(shards)
    assert any(named in problem for problem in problems), problems
    assert all("shard-000000" in problem for problem in problems)


def test_every_flipped_byte_is_found(shards: Path) -> None:
    size = (shards / TAR).stat().st_size
    for offset in range(7, size, size // 25):
        flip(shards / TAR, offset)
        assert verify_shards(shards), offset
        flip(shards / TAR, offset)
    assert verify_shards(shards) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_clips": 99}, "hold 8 clips; the manifest says 99"),
        ({"num_questions": 3}, "hold 16 questions"),
        ({"subtypes": {"binary": 16}}, "questions by subtype"),
        ({"sample_rate": 16_000}, "the manifest 16000"),
    ],
)
def test_a_manifest_that_says_something_else_is_found(shards: Path, change: dict[str, Any], named: str) -> None:
    content = json.loads((shards / MANIFEST_NAME).read_text())
    (shards / MANIFEST_NAME).write_text(json.dumps({**content, **change}))
    problems = verify_shards(shards)
    assert any(named in problem for problem in problems), problems


def test_an_index_that_points_elsewhere_is_found_although_its_hash_is_right(shards: Path) -> None:
    path = shards / index_name(TAR)
    rows = np.load(path)
    for field, value in (("audio_offset", 2**60), ("json_bytes", 2**32 - 1), ("num_frames", 1), ("key", b"0" * 32)):
        changed = rows.copy()
        changed[0][field] = value
        np.save(path, changed)
        forge(shards, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        assert verify_shards(shards), field


def test_a_replaced_shard_with_its_hash_is_found_by_its_samples(shards: Path) -> None:
    other = shards / "shard-000001.tar"
    (shards / TAR).write_bytes(other.read_bytes())
    forge(shards, num_bytes=other.stat().st_size, sha256=hashlib.sha256(other.read_bytes()).hexdigest())
    problems = verify_shards(shards)
    assert problems
    assert all(TAR in problem for problem in problems)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="did not finish"):
        verify_shards(tmp_path)
