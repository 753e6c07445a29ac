"""Small models and hand-laid batches for the tests of the model room."""

from collections.abc import Callable

import pytest
import torch

from mellow_ds.config.schema import DataConfig, DecoderConfig, EncoderConfig, ModelConfig
from mellow_ds.data.batch import Batch
from mellow_ds.model.assemble import build_layout, build_model
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.tokenizer import train_tokenizer
from mellow_ds.prompt import Layout, encode_answer, encode_prompt

TEXTS = (
    "what is heard in the clip?",
    "is it a bell? a) yes b) no",
    "b) a bell, then rain.",
    "yes",
    "no! never",
    "a dog's bark (far away)",
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch) -> None:
    """The hub is not asked (the environment variable is read once, when the library is imported)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def data_config() -> DataConfig:
    return DataConfig(sampling_rate=8000, segment_seconds=0.4, ip_text_len=16, op_text_len=12)


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    encoder = EncoderConfig(
        audioenc_name="Cnn14",
        channels=(4, 8),
        out_emb=8,
        d_proj=32,
        num_classes=5,
        mel_bins=16,
        window_size=256,
        hop_size=160,
        fmax=4000.0,
        audio_tokens=0,
        freeze_audio_encoder_weights=False,
    )
    decoder = DecoderConfig(
        text_decoder="from-config", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64
    )
    return ModelConfig(encoder=encoder, decoder=decoder)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 64)


@pytest.fixture
def model(model_config, data_config, tokenizer) -> MellowForConditionalGeneration:
    return build_model(model_config, data_config, tokenizer, seed=1).eval()


@pytest.fixture
def layout(model, model_config, data_config, tokenizer) -> Layout:
    return build_layout(model_config, data_config, tokenizer, model.num_audio_tokens)


@pytest.fixture
def waveforms() -> torch.Tensor:
    """Three clips [3, 3200]."""
    return torch.randn(3, 3200, generator=torch.Generator().manual_seed(7)) * 0.1


@pytest.fixture
def lay_out(layout, tokenizer, waveforms) -> Callable[..., Batch]:
    """(examples of (clip indices, prompt, answer or None), padding side) -> Batch."""

    def lay(examples, side="right") -> Batch:
        rows = []
        for clips, prompt, answer in examples:
            prompt_ids = encode_prompt(tokenizer, prompt)
            if answer is None:
                ids, starts = layout.prefix(len(clips), prompt_ids)
                rows.append((ids, (-100,) * len(ids), starts))
            else:
                row = layout.example(len(clips), prompt_ids, encode_answer(tokenizer, answer))
                labels = (-100,) * (len(row.input_ids) - row.num_answer_tokens) + row.input_ids[
                    -row.num_answer_tokens :
                ]
                rows.append((row.input_ids, labels, row.clip_starts))
        longest = max(len(ids) for ids, _, _ in rows)

        def pad(values, filler):
            extra = (filler,) * (longest - len(values))
            return [*values, *extra] if side == "right" else [*extra, *values]

        places = [
            (number, start + (longest - len(rows[number][0]) if side == "left" else 0), clip)
            for number, (clips, _, _) in enumerate(examples)
            for start, clip in zip(rows[number][2], clips, strict=True)
        ]
        row, start, index = torch.tensor(places, dtype=torch.long).reshape(-1, 3).unbind(1)
        return Batch(
            waveforms=waveforms,
            input_ids=torch.tensor([pad(ids, 0) for ids, _, _ in rows]),
            attention_mask=torch.tensor([pad((1,) * len(ids), 0) for ids, _, _ in rows]),
            labels=torch.tensor([pad(labels, -100) for _, labels, _ in rows]),
            clip_row=row,
            clip_start=start,
            clip_index=index,
        )

    return lay
