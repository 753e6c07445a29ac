"""Builds what is compared: the project's models at 33 and 129 tokens a clip, the original recipe with the same weights,
and the same examples as batches for each. Random weights: nothing here depends on what a network has learned."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from original_recipe import ANSWER_TOKENS, PROMPT_TOKENS, OriginalRecipe, pad_text
from transformers import LlamaConfig
from workload import END_ID, END_SUFFIX, PAD_ID, Example, clips_of

from mellow_ds.config.load import load_run_config
from mellow_ds.config.schema import RunConfig
from mellow_ds.data.batch import Batch
from mellow_ds.data.collate import collate, prompt_row
from mellow_ds.model.assemble import build_encoder_config
from mellow_ds.model.configuration import MellowConfig
from mellow_ds.model.htsat import trunk_config
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.prompt import Layout

AUDIO_TOKENS = (33, 129)  # with each frame once, and four times as in the original


@dataclass(frozen=True)
class Sizes:
    """SmolLM2-135M and HTSAT with clips of 10 s, unless said otherwise."""

    num_hidden_layers: int = 30
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    vocab_size: int = 49_152
    trunk: dict[str, Any] = dataclasses.field(default_factory=dict)  # what differs from HTSAT's published sizes
    out_emb: int = 768
    clip_seconds: float = 10.0


TINY = Sizes(
    num_hidden_layers=2,
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=3,
    num_key_value_heads=1,
    vocab_size=400,
    trunk={"patch_embeds_hidden_size": 8, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    out_emb=64,
    clip_seconds=1.0,
)


def choose_sizes(tiny: bool, layers: int | None) -> Sizes:
    """The sizes that `--tiny` and `--layers` ask for."""
    sizes = TINY if tiny else Sizes()
    return dataclasses.replace(sizes, num_hidden_layers=layers) if layers else sizes


def recipe_config(sizes: Sizes) -> RunConfig:
    """The recipe `mellow`, with the clip length of `sizes`."""
    return load_run_config("mellow", {"data.segment_seconds": str(sizes.clip_seconds)})


def build_project_models(sizes: Sizes, seed: int) -> dict[int, MellowForConditionalGeneration]:
    """Tokens a clip -> model, encoder frozen as in the recipe. Encoder and decoder are shared to save memory; each has
    a projector of its own."""
    torch.manual_seed(seed)
    models: dict[int, MellowForConditionalGeneration] = {}
    for audio_tokens in AUDIO_TOKENS:
        shared = next(iter(models.values()), None)
        config = _mellow_config(sizes, audio_tokens)
        model = MellowForConditionalGeneration(config, decoder=shared.decoder if shared else None)
        if shared:
            model.encoder = shared.encoder
            model.projector.load_state_dict(shared.projector.state_dict())
        model.set_trainable(("projector", "decoder"))
        models[audio_tokens] = model
    return models


def build_original(model: MellowForConditionalGeneration) -> OriginalRecipe:
    """The original recipe with a copy of the model's weights."""
    encoder = model.config.encoder_config
    original = OriginalRecipe(
        trunk_config(encoder), model.config.text_config, encoder.num_classes, model.config.end_token_id, PAD_ID
    )
    projector = dict(model.projector.state_dict())
    c2l = {name.removeprefix("c2l."): projector.pop(name) for name in list(projector) if name.startswith("c2l.")}
    original.encoder.trunk.load_state_dict(model.encoder.net.trunk.state_dict())
    original.encoder.tscam_conv.load_state_dict(model.encoder.net.tscam_conv.state_dict())
    original.encoder.c2l.load_state_dict(c2l)
    original.projection.load_state_dict(projector)
    original.decoder.load_state_dict(model.decoder.state_dict())
    return original


def count_parameters(models: dict[int, MellowForConditionalGeneration]) -> dict[str, int]:
    """Parameters of each part, a tied one once."""
    parts = next(iter(models.values())).named_children()
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts}


def draw_waveforms(num_examples: int, clip_samples: int, seed: int) -> torch.Tensor:
    """Noise [2 * num_examples, S]: two clips an example (see `workload.clips_of`)."""
    return torch.randn(2 * num_examples, clip_samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def project_batch(
    examples: Sequence[Example], waveforms: torch.Tensor, layout: Layout, for_generation: bool = False
) -> Batch:
    """The examples as the data room collates them; clips that no example hears are not in it."""
    heard = [clips_of(number, layout.num_clips or example.num_clips) for number, example in enumerate(examples)]
    clips = sorted({clip for row in heard for clip in row})
    rows = [
        prompt_row(layout, len(own), example.prompt_ids)
        if for_generation
        else layout.example(len(own), example.prompt_ids, example.answer_ids)
        for example, own in zip(examples, heard, strict=True)
    ]
    return collate(
        rows,
        [[clips.index(clip) for clip in own] for own in heard],
        {"waveforms": waveforms[clips]},
        [str(number) for number in range(len(examples))],
        pad_id=END_ID,
        pad_left=for_generation,
    )


def compact_layout(model: MellowForConditionalGeneration) -> Layout:
    """The recipe's layout: nothing padded."""
    return Layout(model.num_audio_tokens, END_ID, END_ID, PROMPT_TOKENS, ANSWER_TOKENS)


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as the model's keyword arguments."""
    names = [field.name for field in dataclasses.fields(batch) if field.name != "example_ids"]
    return {name: getattr(batch, name) for name in names}


@dataclass(frozen=True)
class OriginalBatch:
    """The arguments of `OriginalRecipe`, everything padded to full length."""

    first: torch.Tensor  # [B, S]
    second: torch.Tensor  # [B, S]; a distractor where the example has one clip
    prompt_ids: torch.Tensor  # [B, 129]
    answer_ids: torch.Tensor  # [B, 250]


def original_batch(examples: Sequence[Example], waveforms: torch.Tensor) -> OriginalBatch:
    """The examples as the original collates them."""
    prompts = [pad_text(example.prompt_ids, END_SUFFIX, PAD_ID, PROMPT_TOKENS) for example in examples]
    answers = [pad_text(example.answer_ids, END_SUFFIX, PAD_ID, ANSWER_TOKENS) for example in examples]
    return OriginalBatch(waveforms[0::2], waveforms[1::2], torch.tensor(prompts), torch.tensor(answers))


def _mellow_config(sizes: Sizes, audio_tokens: int) -> MellowConfig:
    recipe = recipe_config(sizes)
    chosen = dataclasses.replace(recipe.model.encoder, audio_tokens=audio_tokens)
    encoder = build_encoder_config(dataclasses.replace(recipe.model, encoder=chosen), recipe.data)
    encoder.trunk, encoder.out_emb = dict(sizes.trunk), sizes.out_emb
    text_config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    return MellowConfig(encoder, text_config, recipe.model.encoder.projector_dropout, END_ID)
