"""How loud a clip is: peak, root mean square and share of samples at full scale, of 16-bit samples."""

import math
from dataclasses import dataclass

import numpy as np

FLOOR_DBFS = -120.0  # what silence itself is given as; a 16-bit signal that is not all zeros peaks above -91
_FULL_SCALE = 32_767  # of positive samples; -32768 counts too
_BLOCK = 1 << 20  # samples at a time: an hour of audio as float64 would take 1 GB


@dataclass(frozen=True)
class Levels:
    """Levels of one clip; 1 is full scale."""

    peak: float
    rms: float
    clipped: float  # share of the samples at full scale, 0 to 1


def measure_levels(samples: np.ndarray) -> Levels:
    """Levels of int16 [frames]; all 0 where there are no frames."""
    peak, squares, num_clipped = 0, 0.0, 0
    for start in range(0, len(samples), _BLOCK):
        block = np.abs(samples[start : start + _BLOCK].astype(np.int32))
        peak = max(peak, int(block.max()))
        num_clipped += int(np.count_nonzero(block >= _FULL_SCALE))
        squares += float(np.dot(block.astype(np.float64), block))
    num_frames = max(len(samples), 1)
    return Levels(peak / 32_768, math.sqrt(squares / num_frames) / 32_768, num_clipped / num_frames)


def to_dbfs(amplitude: np.ndarray | float) -> np.ndarray:
    """Decibels relative to full scale, not below `FLOOR_DBFS`."""
    return 20 * np.log10(np.maximum(amplitude, 10 ** (FLOOR_DBFS / 20)))
