"""What a clip becomes in a batch: a window of its audio, or features that a frozen encoder made of one.

Both have one face: tensors for a number of clips, filled one by one, each with a crop that in training is a function of
(seed, epoch, clip) and in evaluation (seed None) the first.
"""

from typing import Protocol

import numpy as np
import torch

from mellow_ds.data.audio import AudioError, crop_start, decode_window
from mellow_ds.data.reader import Sample
from mellow_ds.prompt import draw_number
from mellow_ds.shard_format import FeatureInfo


class Clips(Protocol):
    """Makes the tensors of a batch's clips."""

    def tensors(self, num_clips: int) -> dict[str, torch.Tensor]:
        """The fields of a `Batch` that hold `num_clips` clips, zeros until they are filled in: silent waveforms."""
        ...

    def fill(self, tensors: dict[str, torch.Tensor], number: int, sample: Sample, seed: int | None, epoch: int) -> None:
        """Fill in clip `number`; raises `AudioError` where the sample is not what the index says."""
        ...


class WaveformClips:
    """`waveforms` [C, S] float32 in -1 .. 1, zero-padded to the clip window."""

    def __init__(self, sampling_rate: int, clip_samples: int) -> None:
        """`sampling_rate` in Hz, of the shards; `clip_samples`: S."""
        self.sampling_rate = sampling_rate
        self.clip_samples = clip_samples

    def tensors(self, num_clips: int) -> dict[str, torch.Tensor]:
        """See `Clips.tensors`."""
        return {"waveforms": torch.zeros(num_clips, self.clip_samples)}

    def fill(self, tensors: dict[str, torch.Tensor], number: int, sample: Sample, seed: int | None, epoch: int) -> None:
        """See `Clips.fill`."""
        start = crop_start(sample.num_frames, self.clip_samples, seed, epoch, sample.place.key)
        out = tensors["waveforms"][number].numpy()
        decode_window(sample.audio, self.sampling_rate, sample.num_frames, start, out)


class FeatureClips:
    """`embeddings` [C, E, D] and `posteriors` [C, P, classes], float16, copied from the shard as they are."""

    def __init__(self, info: FeatureInfo) -> None:
        self.info = info
        self._split = info.embeddings[0] * info.embeddings[1]

    def tensors(self, num_clips: int) -> dict[str, torch.Tensor]:
        """See `Clips.tensors`."""
        shapes = {"embeddings": self.info.embeddings, "posteriors": self.info.posteriors}
        return {name: torch.zeros(num_clips, *shape, dtype=torch.float16) for name, shape in shapes.items() if shape[0]}

    def fill(self, tensors: dict[str, torch.Tensor], number: int, sample: Sample, seed: int | None, epoch: int) -> None:
        """See `Clips.fill`."""
        num_crops, rest = divmod(len(sample.audio), self.info.crop_bytes)
        if rest or not num_crops:
            raise AudioError(
                f"it has {len(sample.audio)} bytes of features, which are no whole crops of {self.info.crop_bytes}"
            )
        crop = 0 if seed is None else draw_number("crop", seed, epoch, sample.place.key) % num_crops
        start = crop * self.info.crop_bytes
        numbers = np.frombuffer(sample.audio, dtype="<f2", count=self.info.crop_bytes // 2, offset=start)
        if not np.isfinite(numbers).all():
            raise AudioError("it holds features that are not finite")
        tensors["embeddings"][number].numpy().reshape(-1)[:] = numbers[: self._split]
        if "posteriors" in tensors:
            tensors["posteriors"][number].numpy().reshape(-1)[:] = numbers[self._split :]
