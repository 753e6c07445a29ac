"""Feature shards: what a frozen encoder makes of every clip of a shard folder, in place of the audio.

A shard of audio gives a shard of features with the same clips and questions. Shards are independent: processes take
one at a time, and a build that was stopped goes on with those that are missing. What comes after the encoder and is
trained (`c2l`, projector) is not part of it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from mellow_ds.data.audio import AudioError, decode_window
from mellow_ds.data.reader import Sample, ShardReader
from mellow_ds.errors import FaultError, PackingError, ShardError
from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.encoders import AudioFeatures, as_floats, build_encoder
from mellow_ds.model.fingerprint import encoder_fingerprint
from mellow_ds.packing.folder import OutputFolder
from mellow_ds.packing.shard_file import published, write_samples
from mellow_ds.packing.shard_pool import each_shard
from mellow_ds.packing.write import ShardNote, note_path
from mellow_ds.shard_format import FEATURES, FEATURES_EXTENSION, FeatureInfo, Manifest, SampleInfo, ShardInfo

_log = logging.getLogger("mellow_ds.features")
_WEIGHTS_NAME, _CONFIG_NAME = "encoder.safetensors", "encoder.json"


@dataclass(frozen=True)
class FeatureSettings:
    """How feature shards are made."""

    crops: int = 1
    """Most crops of a clip that is longer than the window."""
    batch_size: int = 16
    """Windows that go through the encoder at once."""
    workers: int = 1
    """Processes, each with the encoder; on GPUs they take the devices in turn."""
    device: str = "cpu"
    """cpu or cuda."""
    progress: bool = False
    """Show a progress bar where stderr is a terminal."""

    def __post_init__(self) -> None:
        for option, value in (("crops", self.crops), ("batch-size", self.batch_size), ("workers", self.workers)):
            if value < 1:
                raise PackingError(f"--{option} is {value}; it must be at least 1")


@dataclass(frozen=True)
class _Task:
    """One shard for a worker."""

    source: str  # folder or address of the audio shards
    number: int
    work: Path  # folder to write into, which holds the encoder too
    mark: str  # fingerprint of all that the features follow from
    info: FeatureInfo
    settings: FeatureSettings

    @property
    def device(self) -> torch.device:
        """Where this task is computed."""
        if self.settings.device != "cuda":
            return torch.device(self.settings.device)
        return torch.device("cuda", os.getpid() % torch.cuda.device_count())


def build_feature_shards(
    source: str,
    out: Path,
    encoder: nn.Module,
    config: MellowEncoderConfig,
    encoder_name: str,
    settings: FeatureSettings,
) -> Manifest:
    """Features of all clips in the shard folder `source` by `encoder` (float32), as the shard folder `out`.

    `encoder_name` says for people where the weights are from. A finished build of the same is left as it is. Raises
    `ShardError` for a source that cannot be used, `PackingError` for an `out` that holds something else.
    """
    reader = ShardReader([source], config.sampling_rate)
    if reader.features is not None:
        raise ShardError(f"{source} holds features already: name the shards of the audio")
    folder = OutputFolder(out)
    with folder.locked():
        folder.start_work()
        info = _describe(encoder.eval(), config, encoder_name, settings)
        marks = [_mark(shard, info) for _, shard in reader.shards]
        finished = folder.finished_manifest()
        if finished is not None:
            _check_same(finished, info, reader.fingerprint, out)
            folder.remove_work()
            return finished
        folder.check_unclaimed()
        _save_encoder(encoder, config, folder.work)
        notes = _encode_missing(source, reader, folder, marks, info, settings)
        manifest = _manifest(reader, info, notes)
        folder.publish(list(manifest.shards), manifest)
        return manifest


def _describe(
    encoder: nn.Module, config: MellowEncoderConfig, encoder_name: str, settings: FeatureSettings
) -> FeatureInfo:
    with torch.no_grad():
        silence: AudioFeatures = encoder(torch.zeros(1, config.clip_samples))
    shapes = {}
    for name in ("embeddings", "posteriors"):
        tensor = silence.get(name)
        shapes[name] = (0, 0) if tensor is None else (int(tensor.shape[1]), int(tensor.shape[2]))
    return FeatureInfo(
        encoder=encoder_fingerprint(encoder, config),
        encoder_name=encoder_name,
        clip_samples=config.clip_samples,
        max_crops=settings.crops,
        **shapes,
    )


def _mark(shard: ShardInfo, info: FeatureInfo) -> str:
    return f"{shard.sha256} {info.encoder} {info.max_crops}"


def _check_same(finished: Manifest, info: FeatureInfo, fingerprint: str, out: Path) -> None:
    if finished.features is not None and finished.sources.get("audio_shards") == fingerprint:
        same = (finished.features.encoder, finished.features.max_crops) == (info.encoder, info.max_crops)
        if same:
            return
    raise PackingError(
        f"{out} holds a finished build of something else (other shards, another encoder or other --crops): "
        "give another --out"
    )


def _save_encoder(encoder: nn.Module, config: MellowEncoderConfig, folder: Path) -> None:
    """What workers load: tensors and sizes, nothing that is executed."""
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    part = folder / f"{_WEIGHTS_NAME}.{os.getpid()}.part"
    save_file(tensors, part)
    part.replace(folder / _WEIGHTS_NAME)
    with published(folder / _CONFIG_NAME) as file:
        file.write(json.dumps(config.to_dict()).encode())


def _encode_missing(
    source: str,
    reader: ShardReader,
    folder: OutputFolder,
    marks: list[str],
    info: FeatureInfo,
    settings: FeatureSettings,
) -> list[ShardNote]:
    names = [shard.name for _, shard in reader.shards]
    num_notes = len(list(folder.work.glob("*.done.json")))
    notes = {name: folder.finished_note(name, mark) for name, mark in zip(names, marks, strict=True)}
    missing = [number for number, name in enumerate(names) if notes[name] is None]
    num_others = num_notes - (len(names) - len(missing))
    if num_others:
        _log.warning("%d finished shards of another encoder or other --crops are made anew", num_others)
    tasks = [_Task(source, number, folder.work, marks[number], info, settings) for number in missing]
    num_clips = sum(reader.num_samples(number) for number in missing)
    shown = None if settings.progress else True  # None: where stderr is a terminal
    with tqdm(total=num_clips, desc="encoding", unit="clip", disable=shown) as bar:
        made = each_shard(encode_shard, tasks, settings.workers, bar)
    notes.update({names[number]: note for number, note in zip(missing, made, strict=True)})
    return [note for note in notes.values() if note is not None]


def _manifest(reader: ShardReader, info: FeatureInfo, notes: list[ShardNote]) -> Manifest:
    audio = reader.manifests[0]
    sources = {**audio.sources, "audio_shards": audio.fingerprint, "audio_codec": audio.codec}
    shards = tuple(note.info for note in notes if note.info is not None)
    return Manifest(
        sample_rate=audio.sample_rate,
        codec=FEATURES,
        num_clips=audio.num_clips,
        num_questions=audio.num_questions,
        subtypes=audio.subtypes,
        shards=shards,
        sources=sources,
        features=info,
    )


def encode_shard(task: _Task, count: Callable[[], None]) -> ShardNote:
    """Write the features of one shard, and a note that it is done; `count` is called for each clip."""
    encoder, config = _load_encoder(task.work, task.info.encoder, task.device)
    reader = ShardReader([task.source], config.sampling_rate)
    _, shard = reader.shards[task.number]
    samples = _encoded(reader, task, encoder, count)
    info = write_samples(task.work, shard.name, FEATURES_EXTENSION, samples, shard.num_samples)
    reader.close()
    note = ShardNote(task.mark, info)
    with published(note_path(task.work, shard.name)) as file:
        file.write(note.to_json().encode())
    return note


@lru_cache(maxsize=1)
def _load_encoder(folder: Path, fingerprint: str, device: torch.device) -> tuple[nn.Module, MellowEncoderConfig]:
    """The encoder of a build, once a process. `fingerprint` keeps apart builds into one folder."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # the processes share the cores
    config = MellowEncoderConfig.from_dict(json.loads((folder / _CONFIG_NAME).read_text(encoding="utf-8")))
    encoder = build_encoder(config)
    encoder.load_state_dict(load_file(folder / _WEIGHTS_NAME))
    assert encoder_fingerprint(encoder, config) == fingerprint, "the encoder on disk is that of this build"
    return encoder.to(device).eval(), config


def _encoded(
    reader: ShardReader, task: _Task, encoder: nn.Module, count: Callable[[], None]
) -> Iterator[tuple[SampleInfo, bytes]]:
    """(JSON, features) of the clips of a shard, in the order of storage, a batch of windows in memory at a time."""
    waiting: list[tuple[SampleInfo, int]] = []
    windows: list[np.ndarray] = []
    for row in range(reader.num_samples(task.number)):
        sample = reader.sample(task.number, row)
        own = _windows(sample, reader.sampling_rate, task.info)
        waiting.append((sample.info, len(own)))
        windows += own
        if len(windows) >= task.settings.batch_size:
            yield from _encode(encoder, waiting, windows, task, count)
            waiting, windows = [], []
    yield from _encode(encoder, waiting, windows, task, count)


def _windows(sample: Sample, sampling_rate: int, info: FeatureInfo) -> list[np.ndarray]:
    """The crops of a clip: one from its start, or several evenly spaced where it is longer than the window."""
    spare = sample.num_frames - info.clip_samples
    num_crops = min(info.max_crops, spare + 1) if spare > 0 else 1
    starts = [spare * number // max(num_crops - 1, 1) for number in range(num_crops)]
    found = []
    for start in starts:
        out = np.empty(info.clip_samples, dtype=np.int16)
        try:
            decode_window(sample.audio, sampling_rate, sample.num_frames, start, out)
        except AudioError as error:
            raise ShardError(f"{sample.place}: {error}; build the shards anew") from None
        found.append(out)
    return found


@torch.no_grad()
def _encode(
    encoder: nn.Module,
    waiting: list[tuple[SampleInfo, int]],
    windows: list[np.ndarray],
    task: _Task,
    count: Callable[[], None],
) -> Iterator[tuple[SampleInfo, bytes]]:
    crops: list[bytes] = []
    for start in range(0, len(windows), task.settings.batch_size):
        batch = torch.from_numpy(np.stack(windows[start : start + task.settings.batch_size]))
        crops += _as_bytes(encoder(as_floats(batch.to(task.device))))
    taken = 0
    for info, num_crops in waiting:
        yield info, b"".join(crops[taken : taken + num_crops])
        taken += num_crops
        count()


def _as_bytes(features: AudioFeatures) -> list[bytes]:
    """Each clip's embeddings and posteriors, flat, little-endian float16."""
    parts = [tensor.flatten(1) for tensor in features.values()]
    numbers = torch.cat(parts, dim=1).cpu().to(torch.float16)
    if not torch.isfinite(numbers).all():
        raise FaultError("the encoder gives numbers that float16 does not hold: its features cannot be stored")
    return [row.tobytes() for row in numbers.numpy().astype("<f2")]


def describe(out: Path, manifest: Manifest, started: float) -> str:
    """What a build came to, for people."""
    info = manifest.features
    assert info is not None, "a feature manifest says what the features are"
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    rows: dict[str, Any] = {
        "encoder": f"{info.encoder_name}, hash {info.encoder}",
        "clips": f"{manifest.num_clips:,}, up to {info.max_crops} crops of {info.clip_samples} samples",
        "bytes a crop": f"{info.crop_bytes:,}",
        "questions": f"{manifest.num_questions:,}",
        "shards": f"{len(manifest.shards):,}, {num_bytes:,} bytes",
        "seconds": f"{time.monotonic() - started:.1f}",
    }
    return "\n".join([f"{out} is built", *(f"{name:<13}{text}" for name, text in rows.items())])
