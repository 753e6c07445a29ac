"""What a clip becomes in a batch: a window of its audio, or features that a frozen encoder made of one.

Both have one face: a buffer with a row a clip, filled one by one, and the tensors of a batch that are views of it. The
crop is a function of (seed, epoch, clip) in training, and the first in evaluation (seed None).
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

    def buffer(self, num_clips: int) -> np.ndarray:
        """[C, numbers of a clip], not filled in; a row of zeros is silence where it is audio."""
        ...

    def fill(self, row: np.ndarray, sample: Sample, seed: int | None, epoch: int) -> None:
        """Fill in the row of a clip; raises `AudioError` where the sample is not what the index says."""
        ...

    def tensors(self, buffer: np.ndarray) -> dict[str, torch.Tensor]:
        """The fields of a `Batch` that hold these clips, as views of the buffer."""
        ...


class WaveformClips:
    """`waveforms` [C, S] int16, zero-padded to the clip window."""

    def __init__(self, sampling_rate: int, clip_samples: int) -> None:
        """`sampling_rate` in Hz, of the shards; `clip_samples`: S."""
        self.sampling_rate = sampling_rate
        self.clip_samples = clip_samples

    def buffer(self, num_clips: int) -> np.ndarray:
        """See `Clips.buffer`."""
        return np.empty((num_clips, self.clip_samples), dtype=np.int16)

    def fill(self, row: np.ndarray, sample: Sample, seed: int | None, epoch: int) -> None:
        """See `Clips.fill`."""
        start = crop_start(sample.num_frames, self.clip_samples, seed, epoch, sample.place.key)
        decode_window(sample.audio, self.sampling_rate, sample.num_frames, start, row)

    def tensors(self, buffer: np.ndarray) -> dict[str, torch.Tensor]:
        """See `Clips.tensors`."""
        return {"waveforms": torch.from_numpy(buffer)}


class FeatureClips:
    """`embeddings` [C, E, D] and `posteriors` [C, P, classes], float16, copied from the shard as they are."""

    def __init__(self, info: FeatureInfo) -> None:
        self.info = info

    def buffer(self, num_clips: int) -> np.ndarray:
        """See `Clips.buffer`."""
        return np.empty((num_clips, self.info.crop_bytes // 2), dtype="<f2")

    def fill(self, row: np.ndarray, sample: Sample, seed: int | None, epoch: int) -> None:
        """See `Clips.fill`."""
        num_crops, rest = divmod(len(sample.audio), self.info.crop_bytes)
        if rest or not num_crops:
            raise AudioError(
                f"it has {len(sample.audio)} bytes of features, which are no whole crops of {self.info.crop_bytes}"
            )
        is_drawn = seed is not None and num_crops > 1
        crop = draw_number("crop", seed, epoch, sample.place.key) % num_crops if is_drawn else 0
        # not searched for numbers that are not finite, half of the time of a batch: the checksum says that these are
        # the ones that were written, which are finite
        row[:] = np.frombuffer(sample.audio, dtype="<f2", count=len(row), offset=crop * self.info.crop_bytes)

    def tensors(self, buffer: np.ndarray) -> dict[str, torch.Tensor]:
        """See `Clips.tensors`."""
        info, whole = self.info, torch.from_numpy(buffer)
        split = info.embeddings[0] * info.embeddings[1]
        found = {"embeddings": whole[:, :split].unflatten(1, info.embeddings)}
        if info.posteriors[0]:
            found["posteriors"] = whole[:, split:].unflatten(1, info.posteriors)
        return found
