"""Levels against closed forms."""

import numpy as np
import pytest

from mellow_ds.packing.inspection.levels import FLOOR_DBFS, measure_levels, to_dbfs


def test_a_sine_a_square_and_silence() -> None:
    sine = np.rint(16_384 * np.sin(2 * np.pi * np.arange(8_000) / 80)).astype(np.int16)
    levels = measure_levels(sine)
    assert levels.peak == 0.5
    assert levels.rms == pytest.approx(0.5 / np.sqrt(2), rel=1e-4)
    assert levels.clipped == 0
    square = np.tile(np.array([32_767, -32_768], dtype=np.int16), 500)
    levels = measure_levels(square)
    assert (levels.peak, levels.clipped) == (1.0, 1.0)
    assert levels.rms == pytest.approx(1, rel=1e-4)
    levels = measure_levels(np.zeros(100, dtype=np.int16))
    assert (levels.peak, levels.rms, levels.clipped) == (0, 0, 0)
    assert measure_levels(np.zeros(0, dtype=np.int16)).rms == 0


def test_a_long_clip_is_measured_in_blocks_as_a_whole() -> None:
    samples = np.random.default_rng(0).integers(-32_768, 32_768, (1 << 20) + 12_345).astype(np.int16)
    levels = measure_levels(samples)
    assert levels.rms == pytest.approx(np.sqrt(np.mean(samples.astype(np.float64) ** 2)) / 32_768, rel=1e-12)
    assert levels.clipped == np.mean((samples >= 32_767) | (samples <= -32_767))


def test_decibels_have_a_floor() -> None:
    np.testing.assert_allclose(to_dbfs(np.array([1.0, 0.5, 0.1])), [0, -6.0206, -20], atol=1e-4)
    assert to_dbfs(0.0) == FLOOR_DBFS
