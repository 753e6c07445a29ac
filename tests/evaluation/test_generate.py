"""Answers from files: the same clip and the same text as a plain restatement of the way there gives."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mellow_ds.config.schema import DataConfig, DecoderConfig, EncoderConfig, ModelConfig
from mellow_ds.errors import MellowError
from mellow_ds.evaluation.generate import generate_answer, read_clip

RATE = 8_000
DATA = DataConfig(sampling_rate=RATE, segment_seconds=1.0, ip_text_len=16, op_text_len=8)
MODEL = ModelConfig(
    encoder=EncoderConfig(
        audioenc_name="Cnn14",
        channels=(4, 8),
        out_emb=8,
        d_proj=16,
        num_classes=4,
        freeze_audio_encoder_weights=False,
        fmax=4_000.0,
    ),
    decoder=DecoderConfig(
        text_decoder="from-config",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    ),
)


@pytest.fixture(scope="module")
def parts():
    """(model, processor): tiny, with large weights, so that answers differ with what is heard."""
    from mellow_ds.model.assemble import build_layout, build_model, load_tokenizer
    from mellow_ds.model.processing import build_processor

    words = "which digit is spoken? zero one two three four five six seven eight nine a dog barks in rain and wind"
    tokenizer = load_tokenizer(MODEL, DATA, lambda: [words])
    model = build_model(MODEL, DATA, tokenizer, seed=1)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        # the small weights that training starts from would only repeat the last token
        if parameter.dim() == 2 and ("layers" in name or "projector" in name):
            torch.nn.init.normal_(parameter, std=0.6, generator=draw)
    layout = build_layout(MODEL, DATA, tokenizer, model.num_audio_tokens)
    return model, build_processor(model, tokenizer, layout)


def _noise(folder: Path, name: str, seed: int, rate: int = RATE, channels: int = 1) -> Path:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (rate // 2, channels))
    soundfile.write(folder / name, samples, rate, subtype="PCM_16")
    return folder / name


def test_clip_at_its_own_rate_is_what_the_file_holds(tmp_path: Path) -> None:
    path = _noise(tmp_path, "a.wav", 0)
    wanted, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(read_clip(path, RATE), wanted)


def test_clip_is_mixed_and_resampled(tmp_path: Path) -> None:
    """A 440 Hz tone on one of two channels at 44.1 kHz: half as loud, and still 440 Hz."""
    time = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, 0 * tone], axis=1), 44_100)
    clip = read_clip(tmp_path / "a.flac", RATE)
    assert len(clip) == RATE
    spectrum = np.abs(np.fft.rfft(clip)) / (RATE / 2)
    assert spectrum.argmax() == 440
    assert spectrum[440] == pytest.approx(0.5, abs=0.01)


def test_clip_is_what_a_shard_holds(tmp_path: Path) -> None:
    from mellow_ds.packing.decode import pack_clip

    path = _noise(tmp_path, "a.wav", 0, rate=44_100, channels=2)
    packed, _ = pack_clip(path.read_bytes(), RATE, "flac")
    (tmp_path / "packed.flac").write_bytes(packed)
    wanted, _ = soundfile.read(tmp_path / "packed.flac", dtype="float32")
    np.testing.assert_array_equal(read_clip(path, RATE), wanted)


def test_answer_is_that_of_a_plain_greedy_loop(parts, tmp_path: Path) -> None:
    """No cache, no `generate`: the whole row again for each token."""
    model, processor = parts
    paths = [_noise(tmp_path, "a.wav", 1), _noise(tmp_path, "b.wav", 2)]
    model.eval()
    inputs = processor("which digit is spoken?", [soundfile.read(path, dtype="float32")[0] for path in paths])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    audio = {name: inputs[name] for name in ("waveforms", "clip_row", "clip_start", "clip_index")}
    end_id = processor.row_layout.end_id
    said: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            chosen = int(model(input_ids=ids, attention_mask=mask, **audio).logits[0, -1].argmax())
            if chosen == end_id:
                break
            said.append(chosen)
            ids = torch.cat([ids, torch.tensor([[chosen]])], dim=1)
            mask = torch.ones_like(ids)
    model.train()
    answer = generate_answer(model, processor, paths, "which digit is spoken?", max_new_tokens=6)
    assert answer == processor.tokenizer.decode(said).strip()
    assert answer
    assert model.training


def test_answer_hears_the_clip(parts, tmp_path: Path) -> None:
    model, processor = parts
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE), RATE)
    paths = [_noise(tmp_path, "noise.wav", 1), tmp_path / "silence.wav"]
    noise, silence = (generate_answer(model, processor, [path], "which digit is spoken?", 6) for path in paths)
    assert noise != silence


def test_what_cannot_be_read_is_named(parts, tmp_path: Path) -> None:
    model, processor = parts
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(MellowError, match=r"text\.wav: cannot be decoded"):
        generate_answer(model, processor, [tmp_path / "text.wav"], "what?", 4)
    with pytest.raises(MellowError, match=r"nothing\.wav: file is missing"):
        generate_answer(model, processor, [tmp_path / "nothing.wav"], "what?", 4)
    with pytest.raises(MellowError, match="prompt is empty"):
        generate_answer(model, processor, [_noise(tmp_path, "a.wav", 0)], "  ", 4)
