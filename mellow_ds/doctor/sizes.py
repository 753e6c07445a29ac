"""Sizes of the model that a configuration names, from a model on the meta device: no weight is read or drawn."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from mellow_ds.config.schema import RunConfig
from mellow_ds.config.train_keys import PARTS
from mellow_ds.doctor.activations import count_activations
from mellow_ds.doctor.facts import ModelFacts, PartFacts
from mellow_ds.errors import ConfigError
from mellow_ds.model.assemble import build_config, unfrozen_parts
from mellow_ds.model.decoder import FROM_CONFIG, config_from_sizes, is_gguf, load_decoder_config
from mellow_ds.model.modeling import MellowForConditionalGeneration

# as their configurations on the hub say; for machines that have not fetched them yet
PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "eos_token_id": 0,
    },
    "gpt2": {"model_type": "gpt2"},
}  # fmt: skip
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def model_facts(config: RunConfig, precision: str, small_numbers: int) -> ModelFacts:
    """The sizes of the run's model; `small_numbers`: of a tensor, up to which ZeRO-3 keeps it whole.

    Raises `ConfigError` where parts do not fit together, or the decoder's sizes are neither here nor known.
    """
    text_config, origin = _text_config(config)
    whole = build_config(config.model, config.data, None, text_config)
    with torch.device("meta"):
        model = MellowForConditionalGeneration(whole)
    trained = trained_parts(config)
    model.set_trainable(trained)
    decoder = model.decoder
    head, embedding = decoder.get_output_embeddings(), decoder.get_input_embeddings()
    parts = tuple(_part(name, model.get_submodule(name), small_numbers) for name in PARTS)
    largest = max((p.numel() for p in model.parameters()), default=0)
    positions = int(getattr(text_config, "max_position_embeddings", 0) or 0)
    has_table = any(
        isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings >= positions > 0
        for module in decoder.modules()
    )
    has_batchnorm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.encoder.modules())
    largest_block = _largest_block(decoder)
    audio_tokens = model.num_audio_tokens
    activations = count_activations(model, _HALF.get(precision, torch.float32), "encoder" in trained)
    return ModelFacts(
        parts=parts,
        num_layers=int(text_config.num_hidden_layers),
        vocab_size=int(text_config.vocab_size),
        audio_tokens=audio_tokens,
        max_positions=positions,
        has_position_table=has_table,
        is_tied=head is not None and embedding is not None and head.weight is embedding.weight,
        largest_parameter=largest,
        largest_block=largest_block,
        has_batchnorm=has_batchnorm,
        activations=activations,
        origin=origin,
    )


def trained_parts(config: RunConfig) -> tuple[str, ...]:
    """The parts that are trained at any step of the run, of PARTS."""
    if config.train.phases:
        named = {part for phase in config.train.phases for part in phase.train}
        return tuple(part for part in PARTS if part in named)
    return unfrozen_parts(config.model)


def _text_config(config: RunConfig) -> tuple[PretrainedConfig, str]:
    """(the decoder's configuration, where it comes from if not from what was named)."""
    named = config.model.decoder.text_decoder
    if named == FROM_CONFIG:
        return config_from_sizes(config.model.decoder, config.model.decoder.vocab_size, end_id=0), ""
    try:
        return load_decoder_config(named), ""
    except ConfigError:
        if is_gguf(named) or Path(named).exists() or named not in PUBLISHED_SIZES:
            raise
    fields = dict(PUBLISHED_SIZES[named])
    return AutoConfig.for_model(**fields), f"the published sizes of {named}, which is not in the hub's cache here"


def _part(name: str, part: nn.Module, small_numbers: int) -> PartFacts:
    parameters = list(part.named_parameters())
    trained = [(n, p) for n, p in parameters if p.requires_grad]
    embeddings = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}
    return PartFacts(
        name=name,
        num_parameters=sum(p.numel() for _, p in parameters),
        num_trained=sum(p.numel() for _, p in trained),
        num_trained_matrices=sum(p.numel() for _, p in trained if p.dim() == 2 and id(p) not in embeddings),
        num_small=sum(p.numel() for _, p in parameters if p.numel() <= small_numbers),
        num_adapters=sum(p.numel() for n, p in parameters if ".lora_" in n),
    )


def _largest_block(decoder: nn.Module) -> int:
    """Parameters of the largest entry of a module list: a decoder's layer."""
    sizes = [
        sum(p.numel() for p in block.parameters())
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    ]
    return max(sizes, default=0)
