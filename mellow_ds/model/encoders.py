"""Audio encoders behind one face: waveforms in, the features that the projector makes tokens of out.

What an encoder gives can be stored: with the encoder frozen it is a function of the waveform alone.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel
from transformers.utils import ModelOutput

from mellow_ds.errors import ConfigError
from mellow_ds.model.cnn14 import Cnn14
from mellow_ds.model.configuration import CNN14, HTSAT, HTSAT_REPEATED_TOKENS, HTSAT_TOKENS, MellowEncoderConfig
from mellow_ds.model.frontend import LogMel
from mellow_ds.model.htsat import Htsat
from mellow_ds.model.norm import BatchNorm1d

# model types of transformers that take normalised waveforms at 16 kHz and have a stack of strided convolutions in front
WAVEFORM_MODEL_TYPES = (
    "wav2vec2",
    "wav2vec2-conformer",
    "hubert",
    "wavlm",
    "unispeech",
    "unispeech-sat",
    "data2vec-audio",
)
WAVEFORM_SAMPLING_RATE = 16_000


@dataclass
class AudioFeatures(ModelOutput):
    """What an encoder makes of C clips. A dict too, so that engines find the tensors in it."""

    embeddings: torch.Tensor | None = None
    """[C, E, D]: HTSAT's latent (E is 1), Cnn14's frames, a waveform encoder's frames."""
    posteriors: torch.Tensor | None = None
    """[C, P, classes]: HTSAT's 32 frames, Cnn14's clip (P is 1); None for waveform encoders."""


class HtsatEncoder(nn.Module):
    """Front end and HTSAT: latent and posteriors of 32 frames."""

    def __init__(self, config: MellowEncoderConfig) -> None:
        super().__init__()
        self.log_mel = LogMel(config)
        self.net = Htsat(config)

    def forward(self, waveforms: torch.Tensor) -> AudioFeatures:
        """[C, S] -> latent [C, 1, D], posteriors [C, 32, classes]."""
        latent, logits = self.net(_cast_like(self.log_mel(waveforms), self))
        return AudioFeatures(embeddings=latent.unsqueeze(1), posteriors=torch.sigmoid(logits))

    def clip_posteriors(self, waveforms: torch.Tensor) -> torch.Tensor:
        """[C, S] -> AudioSet posteriors of the clip [C, classes]: the frames' logits averaged, then squashed."""
        _, logits = self.net(_cast_like(self.log_mel(waveforms), self))
        return torch.sigmoid(logits.mean(dim=1))


class Cnn14Encoder(nn.Module):
    """Front end and Cnn14: posteriors of the clip and one embedding a frame."""

    def __init__(self, config: MellowEncoderConfig) -> None:
        super().__init__()
        self.log_mel = LogMel(config)
        self.net = Cnn14(config)

    def forward(self, waveforms: torch.Tensor) -> AudioFeatures:
        """[C, S] -> frames [C, E, D], posteriors [C, 1, classes]."""
        posteriors, frames = self.net(_cast_like(self.log_mel(waveforms), self))
        return AudioFeatures(embeddings=frames, posteriors=posteriors.unsqueeze(1))

    def clip_posteriors(self, waveforms: torch.Tensor) -> torch.Tensor:
        """[C, S] -> AudioSet posteriors of the clip [C, classes]."""
        return self.net(_cast_like(self.log_mel(waveforms), self))[0]


class WaveformEncoder(nn.Module):
    """An encoder of transformers of the wav2vec 2.0 kind, from its saved configuration."""

    def __init__(self, config: MellowEncoderConfig) -> None:
        super().__init__()
        # no masking and no skipped layers: every weight takes part in every step, on every rank
        always = {"layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
        self.net = AutoModel.from_config(AutoConfig.for_model(**{**config.trunk, **always}))
        _use_own_batchnorm(self.net)  # conformers have some
        self.audio_tokens = config.audio_tokens

    def forward(self, waveforms: torch.Tensor) -> AudioFeatures:
        """[C, S] -> frames [C, E, D]; `audio_tokens` of them, averaged from neighbours, where that is set."""
        waveforms = waveforms.float()
        # the family's feature extractor: zero mean and unit variance over the clip
        scale = torch.rsqrt(waveforms.var(dim=1, keepdim=True, correction=0) + 1e-7)
        normalised = (waveforms - waveforms.mean(dim=1, keepdim=True)) * scale
        frames = self.net(_cast_like(normalised, self)).last_hidden_state
        if self.audio_tokens:
            frames = functional.adaptive_avg_pool1d(frames.transpose(1, 2), self.audio_tokens).transpose(1, 2)
        return AudioFeatures(embeddings=frames)


def as_floats(waveforms: torch.Tensor) -> torch.Tensor:
    """Samples of 16 bits as floats in -1 .. 1, without rounding; floats as they are."""
    return waveforms.float() / 32768 if waveforms.dtype == torch.int16 else waveforms


def build_encoder(config: MellowEncoderConfig) -> nn.Module:
    """The untrained encoder that `config` describes."""
    return {HTSAT: HtsatEncoder, CNN14: Cnn14Encoder}.get(config.kind, WaveformEncoder)(config)


def load_waveform_weights(encoder: WaveformEncoder, name: str) -> None:
    """The pretrained weights of the transformers model `name` (hub name or local folder) into a `WaveformEncoder`."""
    pretrained = AutoModel.from_pretrained(name, config=encoder.net.config, dtype=torch.float32)
    encoder.net.load_state_dict(pretrained.state_dict())


def count_audio_tokens(config: MellowEncoderConfig, clip_samples: int | None = None) -> int:
    """Tokens of a clip of `clip_samples` samples (the configured clip by default), without building anything."""
    num_samples = config.clip_samples if clip_samples is None else clip_samples
    if config.kind == HTSAT:
        return HTSAT_REPEATED_TOKENS if config.audio_tokens == HTSAT_REPEATED_TOKENS else HTSAT_TOKENS
    if config.kind == CNN14:
        return 1 + Cnn14.num_frames(LogMel(config).num_frames(num_samples), len(config.channels))
    return config.audio_tokens or _waveform_frames(config, num_samples)


def check_encoder(config: MellowEncoderConfig) -> None:
    """Refuse, with a `ConfigError`, sizes that no network can be built of or that would silently lose audio."""
    where = "model.encoder"
    if config.kind not in (HTSAT, CNN14):
        _check_waveform_encoder(config)
        return
    if config.fmax > config.sampling_rate / 2:
        raise ConfigError(
            f"{where}.fmax is {config.fmax:g} Hz, but audio at {config.sampling_rate} Hz holds nothing above "
            f"{config.sampling_rate / 2:g}: lower fmax or raise data.sampling_rate"
        )
    if config.clip_samples <= config.window_size // 2:
        raise ConfigError(
            f"{where}.window_size is {config.window_size} samples, too long for clips of {config.clip_samples}: "
            "shorten it or raise data.segment_seconds"
        )
    _check_htsat(config) if config.kind == HTSAT else _check_cnn14(config)


def _check_htsat(config: MellowEncoderConfig) -> None:
    frames = LogMel(config).num_frames(config.clip_samples)
    if frames > Htsat.max_frames:
        raise ConfigError(
            f"a clip gives {frames} frames, but HTSAT takes at most {Htsat.max_frames}: "
            "lower data.segment_seconds or raise model.encoder.hop_size"
        )
    if config.mel_bins != Htsat.mel_bins:
        raise ConfigError(f"model.encoder.mel_bins is {config.mel_bins}, but HTSAT takes {Htsat.mel_bins} mel bands")
    width = config.trunk.get("patch_embeds_hidden_size", 96) * 8
    if config.out_emb != width:
        raise ConfigError(f"model.encoder.out_emb is {config.out_emb}, but HTSAT's embeddings have {width} numbers")


def _check_cnn14(config: MellowEncoderConfig) -> None:
    halvings = len(config.channels) - 1
    if config.out_emb != config.channels[-1]:
        raise ConfigError(
            f"model.encoder.out_emb is {config.out_emb}, but the last of model.encoder.channels is "
            f"{config.channels[-1]}: make them equal"
        )
    frames = LogMel(config).num_frames(config.clip_samples)
    if min(frames, config.mel_bins) >> halvings == 0:
        raise ConfigError(
            f"model.encoder.channels has {len(config.channels)} blocks, which leave nothing of {frames} frames and "
            f"{config.mel_bins} mel bins: use fewer blocks"
        )
    natural = count_audio_tokens(config)
    if config.audio_tokens not in (0, natural):
        raise ConfigError(
            f"model.encoder.audio_tokens is {config.audio_tokens}, but this Cnn14 gives {natural} tokens a clip: "
            "set it to 0"
        )


def _check_waveform_encoder(config: MellowEncoderConfig) -> None:
    model_type = config.trunk.get("model_type", "")
    if model_type not in WAVEFORM_MODEL_TYPES:
        raise ConfigError(
            f"model.encoder.audioenc_name names a model of type '{model_type}'; use HTSAT, Cnn14 or one of the types "
            + ", ".join(WAVEFORM_MODEL_TYPES)
        )
    if config.sampling_rate != WAVEFORM_SAMPLING_RATE:
        raise ConfigError(
            f"data.sampling_rate is {config.sampling_rate}, but a {model_type} encoder wants "
            f"{WAVEFORM_SAMPLING_RATE}: pack the shards at that rate"
        )
    width = config.trunk["hidden_size"]
    if config.out_emb != width:
        raise ConfigError(f"model.encoder.out_emb is {config.out_emb}, but the encoder's frames have {width} numbers")


def _waveform_frames(config: MellowEncoderConfig, num_samples: int) -> int:
    frames = num_samples
    for kernel, stride in zip(config.trunk["conv_kernel"], config.trunk["conv_stride"], strict=True):
        frames = (frames - kernel) // stride + 1
    return frames


def _use_own_batchnorm(net: nn.Module) -> None:
    """Replace torch's layers by ours, under the same names."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm1d):
            owner, _, own_name = name.rpartition(".")
            setattr(net.get_submodule(owner), own_name, BatchNorm1d(module.num_features, module.eps, module.momentum))


def _cast_like(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`tensor` in the number format of the module's weights; only the format is read, an engine may hold the data."""
    return tensor.to(next(module.parameters()).dtype)
