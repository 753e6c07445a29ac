"""Batch normalisation: float32 whatever the model's format, over the micro-batches of all ranks where it is asked for.

bfloat16 has 8 bits: running statistics of a log-mel spectrogram (variances of some hundred) would be rounded, and moved
averages would stop moving. Names and shapes are those of `nn.BatchNorm1d` and `nn.BatchNorm2d`.

Three things bear on the statistics beside the input. `synchronise_batchnorm`: they come from all ranks, each weighing
as much as it has values. `paused`: a batch that counts nothing gives nothing to them, yet takes part in what ranks do
together. `statistics_kept_for_recomputation`: where activation checkpointing runs a layer again in the backward pass,
it normalises as it did the first time, moves no running statistics, and asks no other rank.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional


class _Moments(NamedTuple):
    """What a batch is normalised with; float32."""

    mean: torch.Tensor  # [features]
    variance: torch.Tensor  # [features], biased
    num_values: torch.Tensor  # [], values of a feature that count, of all ranks


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Computes in float32 and gives back the type of its input."""

    group: dist.ProcessGroup | None = None  # ranks that share statistics; None: each has its own
    paused: bool = False  # the batch that comes counts nothing

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("running_mean", "running_var"):  # whatever torch's default type is while a model is built
            statistic = getattr(self, name)
            if statistic is not None:
                setattr(self, name, statistic.float())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[C, features, ...] of any floating type -> the same."""
        self._check_input_dim(input)
        if not self.training:
            return self._as_torch(input.float(), batch=False).to(input.dtype)
        noted = _passes.replayed()
        nothing = self.paused if noted is None else noted.nothing
        if self.group is None:
            _passes.note(_Noted(nothing, None))
            return self._as_torch(input.float(), batch=not nothing, moves=noted is None).to(input.dtype)
        x = input.float()
        moments = None if noted is None else noted.moments
        if moments is None:
            moments = self._move_statistics(_moments_of_all(x, nothing, self.group))
        _passes.note(_Noted(nothing, moments))
        scale = torch.rsqrt(moments.variance + self.eps)
        weight, bias = self.weight.float(), self.bias.float()
        normalised = _Normalise.apply(x, weight, bias, moments.mean, scale, moments.num_values, nothing, self.group)
        return normalised.to(input.dtype)

    def _as_torch(self, x: torch.Tensor, batch: bool, moves: bool = True) -> torch.Tensor:
        """With the statistics of x (`batch`), which then move the running ones (`moves`), or with the running ones."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        mean, variance = self.running_mean, self.running_var
        if batch and not moves:
            mean, variance = mean.clone(), variance.clone()  # what is saved must be as much as the first time
        elif batch and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return functional.batch_norm(
            x, mean, variance, self.weight.float(), self.bias.float(), batch, self.momentum, self.eps
        )  # fmt: skip

    @torch.no_grad()
    def _move_statistics(self, moments: _Moments) -> _Moments:
        """Move the running statistics; returns what to normalise with: those, where no rank has a value that counts."""
        mean, variance, count = moments
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        some = count > 0  # stays on the device: asking for it here would make a GPU wait at each layer
        mean = torch.where(some, mean, self.running_mean)
        variance = torch.where(some, variance, self.running_var)
        unbiased = torch.where(some, variance * count / (count - 1).clamp(min=1), self.running_var)
        self.num_batches_tracked.add_(some.to(self.num_batches_tracked.dtype))
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        return _Moments(mean, variance, count)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "_BatchNorm":
        """Casts and moves parameters; the statistics move, but keep their type."""
        kept = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with the above."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the above."""


def synchronise_batchnorm(model: nn.Module, group: dist.ProcessGroup | None) -> int:
    """Let the layers of `model` take their statistics over all ranks of `group` from now on, None: each rank by itself.

    Every rank of the group must then run the same layers the same number of times while they train, forwards and
    backwards (`MellowForConditionalGeneration` does: a rank without clips sends silence that counts nothing). One
    collective a layer in each direction, of 2 x features + 1 and 2 x features numbers. Returns the number of layers.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.group = group
    return len(layers)


@contextmanager
def paused(model: nn.Module, pause: bool = True) -> Iterator[None]:
    """While it lasts, what comes counts nothing: it moves no statistics and is normalised with what others bring, or
    with the running statistics. Everything else stays in train mode: ranks must run the same layers in the same way."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)] if pause else []
    for layer in layers:
        layer.paused = True
    try:
        yield
    finally:
        for layer in layers:
            layer.paused = False


def statistics_kept_for_recomputation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """(context of the forward pass, context of its recomputation): what torch.utils.checkpoint wants as context_fn."""
    tape: list[_Noted] = []
    return _Pass(tape, recomputes=False), _Pass(tape, recomputes=True)


class _Noted(NamedTuple):
    """How a layer normalised."""

    nothing: bool  # the batch counted nothing
    moments: _Moments | None  # of all ranks; None: its own


class _Passes(threading.local):
    """The checkpointed pass that is going on in this thread, if any (autograd has threads of its own)."""

    def __init__(self) -> None:
        self.tape: list[_Noted] | None = None
        self.recomputes = False
        self.position = 0

    def note(self, noted: _Noted) -> None:
        """Keep how a layer normalised, in a pass that will be run again."""
        if self.tape is not None and not self.recomputes:
            self.tape.append(noted)

    def replayed(self) -> _Noted | None:
        """How the layer that comes next normalised the first time; None where this is the first time."""
        if self.tape is None or not self.recomputes:
            return None
        self.position += 1
        return self.tape[self.position - 1]


_passes = _Passes()


class _Pass(AbstractContextManager[None]):
    """Records a pass, or runs it again; may be entered again and again."""

    def __init__(self, tape: list[_Noted], recomputes: bool) -> None:
        self._tape = tape
        self._recomputes = recomputes

    def __enter__(self) -> None:
        self._before = _passes.tape, _passes.recomputes, _passes.position
        _passes.tape, _passes.recomputes, _passes.position = self._tape, self._recomputes, 0

    def __exit__(self, *_: object) -> None:
        _passes.tape, _passes.recomputes, _passes.position = self._before


@torch.no_grad()
def _moments_of_all(x: torch.Tensor, nothing: bool, group: dist.ProcessGroup) -> _Moments:
    """Mean and variance of the values of all ranks. x: [C, features, ...]; `nothing`: this rank's do not count.

    Each rank sends its own mean, sum of squared deviations and number of values, which are put together after Chan,
    Golub and LeVeque (1983): sums of squares would lose digits where the mean is large beside the deviation, as in
    decibels.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = torch.zeros(1, device=x.device) if nothing else torch.full((1,), x.numel() / x.shape[1], device=x.device)
    variance, mean = torch.var_mean(x, axes, correction=0)
    own = torch.cat([mean, variance, count])
    of_ranks = own.new_empty(dist.get_world_size(group) * own.numel())
    dist.all_gather_into_tensor(of_ranks, own, group=group)
    means, variances, counts = of_ranks.view(-1, own.numel()).split([x.shape[1], x.shape[1], 1], dim=1)
    total = counts.sum()
    share = counts / total.clamp(min=1)  # [ranks, 1]
    mean = (share * means).sum(dim=0)
    variance = (share * (variances + (means - mean) ** 2)).sum(dim=0)
    return _Moments(mean, variance, total)


class _Normalise(torch.autograd.Function):
    """(x - mean) x scale x weight + bias, where mean and scale follow from the values of all ranks.

    The gradient of x has what each rank's values do to the outputs of all others; those of weight and bias are this
    rank's part, as that of any other weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        count: torch.Tensor,
        paused: bool,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.paused, ctx.group = paused, group
        return (x - _wide(mean, x)) * _wide(scale * weight, x) + _wide(bias, x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradients[0]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        centred = (x - _wide(mean, x)) * _wide(scale, x)
        of_bias, of_weight = gradient.sum(axes), (gradient * centred).sum(axes)
        sums = torch.cat([of_bias, of_weight])
        dist.all_reduce(sums, group=ctx.group)
        if not ctx.paused:  # mean and scale follow from these values; from those that do not count they do not
            mean_of_bias, mean_of_weight = (sums / count).chunk(2)
            gradient = gradient - _wide(mean_of_bias, x) - centred * _wide(mean_of_weight, x)
        return gradient * _wide(scale * weight, x), of_weight, of_bias, None, None, None, None, None


def _wide(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[features] -> a shape that goes with x, [C, features, ...]."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
