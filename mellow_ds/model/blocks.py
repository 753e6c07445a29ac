"""How the blocks of a model run: activations computed again in the backward pass, and torch.compile.

Both replace what a block's `forward` does on the instance, inside of whatever hooks an engine puts on the block (a
parameter that is gathered before it stays gathered for the second run) and without a name in the state dict changing.
transformers' own switch checkpoints only what is in train mode, which a frozen decoder that passes gradients on is not.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from mellow_ds.model.cnn14 import ConvBlock
from mellow_ds.model.norm import statistics_kept_for_recomputation

_log = logging.getLogger("mellow_ds.model")


def blocks_of(part: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost module lists (decoder blocks, stages of an encoder), and Cnn14's blocks."""
    for child in part.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif isinstance(child, ConvBlock):
            yield child
        else:
            yield from blocks_of(child)


def recompute_activations(model: nn.Module) -> int:
    """Keep of each block of the model its input alone, and run it again in the backward pass; returns their number.

    Losses and gradients are the same: random numbers come again, and BatchNorm statistics move once. Passes without a
    gradient (a frozen encoder, evaluation) and those that fill a cache (generation) run as before.
    """
    forwards = [_forward_of(block) for block in blocks_of(model)]
    for forward in forwards:
        forward.runs_again = True
    return len(forwards)


def compile_blocks(part: nn.Module) -> int:
    """Run the blocks of `part` (a decoder) through torch.compile wherever gradients are wanted; returns their number.

    Blocks of one class share their code, for any batch and length. Where there is nothing to compile with, or a block
    cannot be compiled, one warning says so and all run as before.
    """
    blocks = list(blocks_of(part))
    if not blocks or not _compiler_works(next(part.parameters()).device):
        return 0
    shared: dict[type, _Compiled] = {}
    for block in blocks:
        kind = type(block)
        shared.setdefault(kind, _Compiled(kind))
        _forward_of(block).compiled = shared[kind]
    return len(blocks)


class _Forward:
    """Stands in for the `forward` of one block."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self.runs_again = False
        self.compiled: _Compiled | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._once(*args, **kwargs)
        run = self._once if self.compiled is None else self._compiled_once
        # a second run would put keys and values into the cache a second time
        if not self.runs_again or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return run(*args, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, context_fn=statistics_kept_for_recomputation, **kwargs)

    def _once(self, *args: Any, **kwargs: Any) -> Any:
        # by the class, which an engine may have changed
        return type(self._block).forward(self._block, *args, **kwargs)

    def _compiled_once(self, *args: Any, **kwargs: Any) -> Any:
        assert self.compiled is not None
        return self.compiled(self._block, *args, **kwargs)


class _Compiled:
    """The compiled `forward` of a class of blocks, until it fails."""

    def __init__(self, kind: type) -> None:
        self._name = kind.__name__
        self._eager: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]
        self._run: Callable[..., Any] = torch.compile(self._eager, dynamic=True)

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._run(block, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _warn(f"{self._name} cannot be compiled ({_first_line(error)})")
            self._run = self._eager
            return self._eager(block, *args, **kwargs)

    def __deepcopy__(self, _: dict[int, Any]) -> "_Compiled":
        return self


def _forward_of(block: nn.Module) -> _Forward:
    found = vars(block).get("forward")
    if not isinstance(found, _Forward):
        found = _Forward(block)
        block.forward = found
    return found


def _compiler_works(device: torch.device) -> bool:
    """Compile something small, forwards and backwards: what is missing (g++, Triton) shows only then."""
    x = torch.ones(2, device=device if device.type != "meta" else "cpu", requires_grad=True)
    try:
        torch.compile(torch.sin)(x).sum().backward()
    except Exception as error:  # a missing compiler raises one of many kinds
        _warn(f"torch.compile does not work here ({_first_line(error)})")
        return False
    return True


def _warn(what: str) -> None:
    _log.warning("%s: train.compile changes nothing, the decoder's blocks run as they are", what)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
