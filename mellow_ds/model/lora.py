"""Low-rank adapters on the decoder, through peft, which is imported only where a model has some.

    decoder.<layer>.base_layer.weight        the decoder's own weight, which stays as it is
    decoder.<layer>.lora_A.default.weight    [rank, in]
    decoder.<layer>.lora_B.default.weight    [out, rank]

What the layer adds is B A x (alpha / rank). The head never has adapters: where it is tied, its weight is the embedding.
"""

import math
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mellow_ds.config.schema import LoraConfig
from mellow_ds.errors import ConfigError

ALL_LINEAR = "all-linear"
_KEY = "model.decoder.lora"
_ADAPTER = "default"  # peft's name for the only adapter
_BASE = ".base_layer."
_DOWN, _UP = f"lora_A.{_ADAPTER}.weight", f"lora_B.{_ADAPTER}.weight"


def lora_fields(lora: LoraConfig) -> dict[str, Any] | None:
    """What a model's configuration keeps of the run's; None where there are no adapters."""
    if not lora.rank:
        return None
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
    }


def add_adapters(decoder: PreTrainedModel, fields: dict[str, Any]) -> None:
    """Put adapters on the layers of `decoder` that `fields` (of `lora_fields`) names, in place.

    They add nothing as yet: B is zero. Raises `ConfigError` for a name without a layer, and where peft is missing.
    """
    targets = _target_names(decoder, fields["target_modules"])
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"{_KEY}.rank is {fields['rank']}, which needs the package peft ({error}): install mellow-ds with the "
            "extra 'lora' (pip install 'mellow-ds[lora]')"
        ) from None
    config = PeftConfig(
        r=fields["rank"],
        lora_alpha=fields["alpha"],
        lora_dropout=fields["dropout"],
        target_modules=targets,
        # GPT-2 keeps its weights as [in, out]
        fan_in_fan_out=all(isinstance(decoder.get_submodule(name), Conv1D) for name in targets),
    )
    with warnings.catch_warnings():
        # layers of both kinds in one decoder: peft sets each right, and says so at each
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        inject_adapter_in_model(config, decoder, adapter_name=_ADAPTER)
    # peft switches off the gradients of all else; which parts are trained is for set_trainable to say
    decoder.requires_grad_(True)


@torch.no_grad()
def draw_adapters(decoder: nn.Module, seed: int) -> None:
    """Draw all adapters anew as peft does by default (A uniform within 1 / sqrt(inputs), B zero), as a function of the
    seed alone; those on the meta device become real."""
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in list(decoder.named_parameters()):
        if not is_adapter(name):
            continue
        values = torch.zeros(parameter.shape)
        if name.endswith(_DOWN):
            bound = 1 / math.sqrt(parameter.shape[1])
            values.uniform_(-bound, bound, generator=draws)
        if parameter.is_meta:
            owner, _, own_name = name.rpartition(".")
            setattr(decoder.get_submodule(owner), own_name, nn.Parameter(values))
        else:
            parameter.copy_(values)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith((_DOWN, _UP))


def plain_name(name: str) -> str:
    """The name that a weight has in the decoder without adapters; that of an adapter as it is."""
    return name.replace(_BASE, ".")


def adapters_of(name: str) -> tuple[str, str]:
    """The names of A and B that belong to the weight `name` (of `weights_with_adapters`)."""
    owner = name.partition(_BASE)[0]
    return f"{owner}.{_DOWN}", f"{owner}.{_UP}"


def weights_with_adapters(model: nn.Module) -> dict[str, bool]:
    """Names of the weights that have adapters -> whether they lie as [in, out] (GPT-2's) rather than [out, in]."""
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if name.endswith(_BASE.rstrip("."))
    }


def merged(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, fields: dict[str, Any], transposed: bool
) -> torch.Tensor:
    """The weight with its adapters in it, float32. weight: [out, in], or transposed; A [rank, in], B [out, rank]."""
    change = (up.double() @ down.double()) * (fields["alpha"] / fields["rank"])
    return (weight.double() + (change.T if transposed else change)).float()


def _target_names(decoder: PreTrainedModel, wanted: list[str]) -> list[str]:
    """Full names of the layers that get adapters."""
    head = decoder.get_output_embeddings()
    linear = [
        name for name, module in decoder.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]  # fmt: skip
    chosen: set[str] = set()
    for target in wanted:
        found = [name for name in linear if target == ALL_LINEAR or f".{name}".endswith(f".{target}")]
        if not found:
            there = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"{_KEY}.target_modules names '{target}', but no linear layer of the decoder (its head left out) is "
                f"called so; there are {', '.join(there)}, or all-linear for all of them"
            )
        chosen.update(found)
    return [name for name in linear if name in chosen]
