"""The front end against numpy written from the definition: frames, Fourier, Slaney mel bands, decibels."""

import numpy as np
import pytest
import torch

from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.frontend import LogMel


def hz_to_mel(hz):
    """Slaney: linear below 1 kHz (200/3 Hz a mel), logarithmic above (27 mels for a factor of 6.4)."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4))


def mel_to_hz(mel):
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def filter_bank(rate, window, bands, fmin, fmax):
    edges = mel_to_hz(np.linspace(hz_to_mel(fmin), hz_to_mel(fmax), bands + 2))
    frequencies = np.arange(window // 2 + 1) * rate / window
    bank = np.zeros((bands, len(frequencies)))
    for band in range(bands):
        low, centre, high = edges[band : band + 3]
        rise, fall = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
        bank[band] = np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)
    return bank


def log_mel_by_hand(wave, rate, window, hop, bands, fmin, fmax):
    padded = np.pad(wave.astype(np.float64), window // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = [padded[i : i + window] * hann for i in range(0, len(wave) + 1, hop)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = power @ filter_bank(rate, window, bands, fmin, fmax).T
    return 10 * np.log10(np.maximum(mel, 1e-10))


@pytest.mark.parametrize(
    ("rate", "window", "hop", "bands", "fmax"), [(32000, 1024, 320, 64, 14000), (8000, 256, 80, 24, 4000)]
)
def test_the_log_mel_is_what_the_definition_gives(rate, window, hop, bands, fmax):
    config = MellowEncoderConfig(
        sampling_rate=rate, window_size=window, hop_size=hop, mel_bins=bands, fmin=50.0, fmax=float(fmax)
    )
    t = np.arange(rate // 4) / rate
    wave = (0.3 * np.sin(2 * np.pi * (300 * t + 900 * t**2)) + 0.01 * np.random.RandomState(0).randn(len(t))).astype(
        "f4"
    )
    wave[-len(wave) // 5 :] = 0  # silence: the floor of -100 dB
    expected = log_mel_by_hand(wave, rate, window, hop, bands, 50.0, fmax)
    found = LogMel(config)(torch.from_numpy(wave)[None])
    assert found.shape == (1, 1, len(wave) // hop + 1, bands)
    assert LogMel(config).num_frames(len(wave)) == found.shape[2]
    assert expected.min() == -100
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-3)


def test_the_original_s_clip_has_1001_frames():
    assert LogMel(MellowEncoderConfig()).num_frames(320_000) == 1001


def test_a_16_bit_model_keeps_its_front_end_in_float32(model, waveforms):
    before = model.encoder.log_mel(waveforms)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert not [name for name in names if "mel" in name or "window" in name]
    for change in (model.bfloat16, model.half):
        change()
        after = model.encoder.log_mel(waveforms)
        assert after.dtype == torch.float32
        assert torch.equal(before, after)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(before, model.encoder.log_mel(waveforms))


def test_a_bfloat16_model_runs_from_float32_waveforms(model, lay_out):
    batch = lay_out([((0, 1), "what is heard in the clip?", "a bell")])
    model.bfloat16()
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        waveforms=batch.waveforms,
        clip_row=batch.clip_row,
        clip_start=batch.clip_start,
        clip_index=batch.clip_index,
        labels=batch.labels,
    )
    assert output.logits.dtype == torch.bfloat16
    assert output.loss_sum.dtype == torch.float32
    assert torch.isfinite(output.loss_sum)


def test_no_gradient_is_kept_for_the_waveform():
    wave = torch.randn(1, 3200, requires_grad=True)
    assert not LogMel(MellowEncoderConfig(sampling_rate=8000, window_size=256, fmax=4000.0))(wave).requires_grad
