"""A small model with all that a back end can get wrong, and made-up batches for it.

A frozen encoder with buffers, tied embeddings, one clip and two clips in a batch, answers of unequal lengths. Nothing
is read from disk.
"""

import torch

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.batch import IGNORE_INDEX, Batch
from mellow_ds.model.configuration import MellowConfig, MellowEncoderConfig
from mellow_ds.model.modeling import MellowForConditionalGeneration

CLIP_SAMPLES = 3200
SAMPLE_RATE = 32_000  # Hz
VOCABULARY = 40
TRAIN = TrainConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.9)  # some steps clip, some do not


def small_model(
    seed: int,
    dropout: float = 0.0,
    vocabulary: int = VOCABULARY,
    width: int = 16,
    channels: tuple[int, ...] = (4, 8),
) -> MellowForConditionalGeneration:
    """Frozen narrow Cnn14, projector, two-layer Llama with tied embeddings; in training mode.

    `dropout`: of the projector; `width`: of the decoder; `channels`: of the encoder. All weights follow from `seed`.
    """
    torch.manual_seed(seed)
    encoder = MellowEncoderConfig(
        kind="Cnn14",
        sampling_rate=SAMPLE_RATE,
        clip_samples=CLIP_SAMPLES,
        channels=channels,
        out_emb=channels[-1],
        num_classes=5,
        mel_bins=16,
        audio_tokens=0,
    )
    text = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width // 2, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": vocabulary, "tie_word_embeddings": True,
    }  # fmt: skip
    model = MellowForConditionalGeneration(
        MellowConfig(encoder_config=encoder, text_config=text, projector_dropout=dropout)
    )
    model.set_trainable(("projector", "decoder"))
    return model.train()


def example(number: int, audio_tokens: int) -> dict[str, torch.Tensor]:
    """One example: one or two clips, a prompt, and an answer of 1 to 5 tokens."""
    draw = torch.Generator().manual_seed(number)
    num_clips = 1 + number % 2
    answer = torch.randint(1, VOCABULARY, (1 + number % 5,), generator=draw)
    head = num_clips * (audio_tokens + 1) + 3
    ids = torch.cat([torch.randint(1, VOCABULARY, (head,), generator=draw), answer])
    labels = torch.cat([torch.full((head,), IGNORE_INDEX), answer])
    return {"ids": ids, "labels": labels, "clips": torch.randn(num_clips, CLIP_SAMPLES, generator=draw) * 0.1}


def batch_of(numbers: list[int], audio_tokens: int) -> Batch:
    """These examples as a right-padded batch; without any, one row that counts nothing."""
    examples = [example(number, audio_tokens) for number in numbers or [0]]
    length = max(len(e["ids"]) for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    placements = []
    clips: list[torch.Tensor] = []
    for row, e in enumerate(examples):
        ids[row, : len(e["ids"])] = e["ids"]
        mask[row, : len(e["ids"])] = 1
        if numbers:
            labels[row, : len(e["labels"])] = e["labels"]
        for place, clip in enumerate(e["clips"]):
            placements.append((row, place * (audio_tokens + 1), len(clips)))
            clips.append(clip)
    rows, starts, indices = torch.tensor(placements).unbind(dim=1)
    return Batch(torch.stack(clips), ids, mask, labels, rows, starts, indices, tuple(map(str, numbers)))
