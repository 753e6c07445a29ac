"""Frozen parts that stay whole on every rank where a back end shards parameters: gathering them would only cost."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

HALF_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def whole_parts(model: nn.Module, max_megabytes: float) -> list[str]:
    """Names of the model's parts that are frozen altogether and no larger than that (as float32)."""
    found = []
    for name, part in model.named_children():
        parameters = list(part.parameters())
        if any(p.requires_grad for p in parameters):
            continue
        if parameters and sum(4 * p.numel() for p in parameters) <= max_megabytes * 1e6:
            found.append(name)
    return found


def place(part: nn.Module, device: torch.device, precision: str) -> None:
    """Bring a part that no back end takes care of to its device, its parameters to the number format of the run.

    Buffers keep theirs: BatchNorm statistics, and what a module computes for itself (rotary frequencies in bfloat16
    are off by 0.4 rad at position 300).
    """
    dtype = HALF_TYPES.get(precision, torch.float32)
    for parameter in part.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for module in part.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


@contextmanager
def hidden(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The model without these parts, for the time that a back end takes hold of it; their places are kept."""
    modules = dict(model._modules)
    parts = {name: modules[name] for name in names}
    for name in names:
        del model._modules[name]
    try:
        yield
    finally:
        # as before, in the same order: names of parameters are listed in it
        for name in modules:
            model._modules[name] = parts[name] if name in parts else model._modules.pop(name)
