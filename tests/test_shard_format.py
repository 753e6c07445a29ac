"""What writer and reader share: samples as JSON, manifests read and refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from mellow_ds.errors import ShardError
from mellow_ds.shard_format import (
    Manifest,
    Question,
    SampleInfo,
    ShardInfo,
    check_shard_size,
    question_id,
    read_index,
    read_manifest,
    sample_checksum,
)

QUESTION = Question("id", ("k1", "k2"), "what?", "a bell", "open", "task", ("one", "two"))
SAMPLE = SampleInfo("k1", "a/b.wav", 32_000, 100, (QUESTION,))
SHARD = ShardInfo("shard-000000.tar", 10, "a" * 64, "b" * 64, 1, 1)
MANIFEST = Manifest(32_000, "flac", 1, 1, {"open": 1}, (SHARD,), {})


def test_a_sample_survives_json_and_is_the_same_bytes_each_time() -> None:
    payload = SAMPLE.to_json()
    assert SampleInfo.from_json(payload, "here") == SAMPLE
    assert payload == SampleInfo.from_json(payload, "here").to_json()
    assert json.loads(payload) == json.loads(json.dumps(dataclasses.asdict(SAMPLE)))


@pytest.mark.parametrize("payload", [b"", b"[]", b"{}", b"\xff", b'{"questions": 3}', b'{"questions": [{}]}'])
def test_json_that_is_no_sample_is_refused_with_its_place(payload: bytes) -> None:
    with pytest.raises(ShardError, match="shard x: the JSON member is not a sample"):
        SampleInfo.from_json(payload, "shard x")


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(MANIFEST.to_json())
    assert read_manifest(tmp_path) == MANIFEST


def test_the_fingerprint_follows_the_content() -> None:
    other = dataclasses.replace(MANIFEST, shards=(dataclasses.replace(SHARD, sha256="c" * 64),))
    assert MANIFEST.fingerprint == dataclasses.replace(MANIFEST, sources={"json": "moved"}).fingerprint
    assert MANIFEST.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format version 2; this program reads version 1"),
        ({"codec": None, "colour": 1}, "lacks or misnames a field"),
        ({"shards": [{"name": "x.tar"}]}, "lacks or misnames a field"),
        ({"shards": [{**dataclasses.asdict(SHARD), "name": "../x.tar"}]}, "not a file name of this folder"),
        ({"shards": [{**dataclasses.asdict(SHARD), "name": 5}]}, "names a shard by 5"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({**json.loads(MANIFEST.to_json()), **change}))
    with pytest.raises(ShardError, match=message):
        read_manifest(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="is not there: make it with `mellow-shards build`"):
        read_manifest(tmp_path / "none")
    with pytest.raises(ShardError, match="holds no manifest"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(ShardError, match=r"shard-000000\.tar cannot be read"):
        check_shard_size(tmp_path, SHARD)
    (tmp_path / SHARD.name).write_bytes(b"12345")
    with pytest.raises(ShardError, match="has 5 bytes; the manifest says 10"):
        check_shard_size(tmp_path, SHARD)
    with pytest.raises(ShardError, match="cannot be read"):
        read_index(tmp_path, SHARD)
    (tmp_path / "shard-000000.index.npy").write_bytes(b"12345")
    with pytest.raises(ShardError, match="is not the index that the manifest names"):
        read_index(tmp_path, SHARD)


def test_every_flipped_bit_of_a_sample_changes_its_checksum() -> None:
    audio, info = bytes(range(40)), SAMPLE.to_json()
    right = sample_checksum(audio, info)
    for bit in range(8 * len(audio)):
        changed = bytearray(audio)
        changed[bit // 8] ^= 1 << bit % 8
        assert sample_checksum(bytes(changed), info) != right


def test_question_ids_tell_records_apart() -> None:
    first = question_id(("a",), "q", "yes", "s", 0)
    assert first == question_id(("a",), "q", "yes", "s", 0)
    others = {question_id(("b",), "q", "yes", "s", 0), question_id(("a",), "q", "yes", "s", 1)}
    assert len({first, *others}) == 3
