"""The log-mel front end: waveform to log-mel spectrogram, in float32 whatever the model's number format is."""

from typing import Any

import torch

from mellow_ds.model.configuration import MellowEncoderConfig

_FLOOR = 1e-10  # power below which all is silence: -100 dB


class LogMel:
    """10 log10 of the power in Slaney mel bands, as the original computes it (centred frames, reflected at the ends).

    Not a module, on purpose: window and filter bank are plain tensors, so neither `model.half()` nor an engine that
    partitions, casts or saves parameters and buffers touches them. They are made on first use, where the waveform is.
    """

    def __init__(self, config: MellowEncoderConfig) -> None:
        self._hop_size = config.hop_size
        self._arguments: dict[str, Any] = {
            "sample_rate": config.sampling_rate,
            "n_fft": config.window_size,
            "hop_length": config.hop_size,
            "f_min": config.fmin,
            "f_max": config.fmax,
            "n_mels": config.mel_bins,
            "norm": "slaney",
            "mel_scale": "slaney",
        }
        self._transforms: dict[torch.device, torch.nn.Module] = {}

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of `num_samples` samples."""
        return num_samples // self._hop_size + 1

    @torch.no_grad()
    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """[C, S] samples in -1 .. 1 -> [C, 1, frames, mel bins] float32 decibels."""
        with torch.autocast(waveforms.device.type, enabled=False):
            power = self._transform(waveforms.device)(waveforms.float())
            decibels = 10 * torch.log10(power.clamp(min=_FLOOR))
        return decibels.transpose(1, 2).unsqueeze(1)

    def _transform(self, device: torch.device) -> torch.nn.Module:
        if device not in self._transforms:
            from torchaudio.transforms import MelSpectrogram

            with torch.device("cpu"):
                transform = MelSpectrogram(**self._arguments)
            self._transforms[device] = transform.to(device=device, dtype=torch.float32)
        return self._transforms[device]
