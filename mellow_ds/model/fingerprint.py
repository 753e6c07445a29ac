"""Which encoder is it? A hash over its weights, sizes and front end, that feature shards carry and a run compares."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from mellow_ds.errors import ConfigError
from mellow_ds.model.configuration import WAVEFORM, MellowEncoderConfig
from mellow_ds.shard_format import KEY_LENGTH, FeatureInfo

_FRONT_END = ("kind", "sampling_rate", "clip_samples", "window_size", "hop_size", "mel_bins", "fmin", "fmax", "trunk")
_UNUSED_IN_EVAL = ".num_batches_tracked"  # a counter of BatchNorm, which the output does not depend on


@torch.no_grad()
def encoder_fingerprint(encoder: nn.Module, config: MellowEncoderConfig) -> str:
    """Hash over all that the features of a clip follow from, the same on every machine; weights count as float32.

    HTSAT's and Cnn14's `audio_tokens` are not part of it: the projector repeats frames, after the features.
    """
    about: dict[str, Any] = {name: getattr(config, name) for name in _FRONT_END}
    if config.kind == WAVEFORM:
        about["audio_tokens"] = config.audio_tokens
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.endswith(_UNUSED_IN_EVAL):
            plain = tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()
            digest.update(f"{name} {list(plain.shape)}".encode())
            digest.update(plain.contiguous().numpy().tobytes())
    return digest.hexdigest()[:KEY_LENGTH]


def check_features(info: FeatureInfo, encoder: nn.Module, config: MellowEncoderConfig) -> None:
    """Raise `ConfigError` where features were not made by this encoder, front end and clip window."""
    if info.clip_samples != config.clip_samples:
        raise ConfigError(
            f"data.shards hold features of windows of {info.clip_samples} samples, but data.segment_seconds asks for "
            f"{config.clip_samples}: set it to {info.clip_samples / config.sampling_rate:g}, or make the features anew"
        )
    found = encoder_fingerprint(encoder, config)
    if info.encoder != found:
        raise ConfigError(
            f"data.shards hold features of {info.encoder_name} with the hash {info.encoder}, but this run's encoder, "
            f"{config.kind}, has {found}: name the weights that the features were made with, make them anew with "
            "mellow-shards features, or train on audio shards"
        )
