"""A `webdataset` pipeline over a shard folder, for people's own training loops; the project's stream does not use it.

Tars are opened here, and only audio and JSON members are decoded, by functions of this room. webdataset's own opener
may run a shell (`pipe:`), its `.decode()` unpickles and imports by a member's name, and it passes over a cut tar in
silence: none of it is reached from here.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mellow_ds.data.audio import AudioError, decode_clip
from mellow_ds.errors import ShardError
from mellow_ds.shard_format import (
    AUDIO_EXTENSIONS,
    FEATURES_EXTENSION,
    MAX_MEMBER_BYTES,
    FeatureInfo,
    SampleInfo,
    ShardInfo,
    check_shard_size,
    read_index,
    read_manifest,
    sample_checksum,
)


def as_webdataset(
    folder: str | Path,
    shuffle_samples: int = 0,
    seed: int = 0,
    nodesplitter: Callable[[Iterable[Any]], Iterator[Any]] | None = None,
) -> Any:
    """A `webdataset` pipeline of dicts `key`, `audio` (float32 [samples]), `sample_rate` (Hz), `info` (SampleInfo).

    Feature shards give `features` (float16 [crops, numbers], as in the manifest's `features`) in place of the audio.

    Shards are split over ranks (webdataset's `split_by_node`, or `nodesplitter`) and loader processes;
    `shuffle_samples` > 0 shuffles in a buffer of so many compressed samples. The result has webdataset's methods
    (`.map`, `.batched`, ...). Raises `ShardError` for a folder that is no local shard folder and for a tar that is not
    as the manifest says; and while iterating, for a member that is not of this format, a sample that is damaged and a
    shard that ends early.
    """
    import webdataset  # the library: this file is mellow_ds.data.webdataset

    text = str(folder)
    if text.startswith("pipe:") or "://" in text:
        raise ShardError(f"{text} is not a local folder: as_webdataset reads folders, no addresses and no commands")
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        check_shard_size(folder, shard)
    pipeline = webdataset.FluidWrapper(webdataset.SimpleShardList([shard.name for shard in manifest.shards]))
    pipeline.append(nodesplitter or webdataset.split_by_node)
    pipeline.append(webdataset.split_by_worker)
    pipeline.append(partial(_read_shards, Path(folder), {shard.name: shard for shard in manifest.shards}))
    if shuffle_samples:
        pipeline = pipeline.shuffle(shuffle_samples, seed=seed)
    return pipeline.map(partial(_decode_sample, manifest.features))


def _read_shards(
    folder: Path, infos: dict[str, ShardInfo], sources: Iterable[dict[str, str]]
) -> Iterator[dict[str, Any]]:
    """Samples of the shards that `sources` name, as webdataset groups members, held against index and manifest."""
    from webdataset.tariterators import group_by_keys

    for source in sources:
        info = infos[source["url"]]
        path = folder / info.name
        checksums = {row["key"].decode("ascii", "replace"): int(row["checksum"]) for row in read_index(folder, info)}
        num_samples = 0
        for sample in group_by_keys(_members(path)):
            audio, text = _audio_and_json(sample)
            if checksums.get(sample["__key__"]) != sample_checksum(audio, text):
                raise ShardError(f"{_where(sample)}: it is not the sample that the index names: copy the shard again")
            num_samples += 1
            yield sample
        if num_samples != info.num_samples:
            raise ShardError(f"{path} holds {num_samples} samples; the manifest says {info.num_samples}: copy it again")


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """The members of a tar in order, in the form that webdataset groups."""
    try:
        with tarfile.open(path, "r|") as tar:  # no compression: a shard has none, and none can burst
            for member in tar:
                if not member.isreg() or member.size > MAX_MEMBER_BYTES:
                    raise ShardError(f"{path} has the member '{member.name}' of {member.size} bytes, which is not ours")
                content = tar.extractfile(member)
                assert content is not None, "a regular member has content"
                yield {"fname": member.name, "data": content.read(), "__url__": str(path)}
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path} cannot be read as a tar ({error}): copy it again or build the shards anew") from None


def _where(sample: dict[str, Any]) -> str:
    return f"{sample['__url__']}, sample {sample['__key__']}"


def _audio_and_json(sample: dict[str, Any]) -> tuple[bytes, bytes]:
    """The two members of a sample; raises `ShardError` where there are others, whatever their names."""
    names = [name for name in sample if not name.startswith("__")]
    audio = [name for name in names if name in (*AUDIO_EXTENSIONS, FEATURES_EXTENSION)]
    if len(audio) != 1 or sorted(names) != sorted([*audio, "json"]):
        raise ShardError(f"{_where(sample)} has the members {', '.join(names)}; wanted are one of audio and json")
    return sample[audio[0]], sample["json"]


def _decode_sample(features: FeatureInfo | None, sample: dict[str, Any]) -> dict[str, Any]:
    where = _where(sample)
    audio, text = _audio_and_json(sample)
    info = SampleInfo.from_json(text, where)
    if features is not None:
        crops = np.frombuffer(audio, dtype="<f2").reshape(-1, features.crop_bytes // 2)
        return {"key": sample["__key__"], "features": crops, "sample_rate": info.sample_rate, "info": info}
    try:
        decoded = decode_clip(memoryview(audio), info.sample_rate, info.num_frames)
    except AudioError as error:
        raise ShardError(f"{where}: {error}: build the shards anew") from None
    return {"key": sample["__key__"], "audio": decoded, "sample_rate": info.sample_rate, "info": info}
