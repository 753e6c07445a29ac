"""Master weights and moments of ZeRO stage 0: whole on every rank, a tensor a parameter or a flat one a group."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mellow_ds.engine.optimizer import ADAM_MOMENTS


def whole_masters(
    optimizer: torch.optim.Optimizer, group_parameters: Sequence[Sequence[nn.Parameter]]
) -> Iterator[tuple[nn.Parameter, dict[str, torch.Tensor]]]:
    """(parameter, views of its "weight" and of the moments that there are), in the shape of the parameter.

    `group_parameters`: the model's own, by group of `optimizer`, which under half precision holds one flat tensor each.
    """
    for parameters, group in zip(group_parameters, optimizer.param_groups, strict=True):
        masters = group["params"]
        num_numbers = sum(parameter.numel() for parameter in parameters)
        is_flat = len(masters) == 1 and masters[0].ndim == 1 and masters[0].numel() == num_numbers
        start = 0
        for number, parameter in enumerate(parameters):
            master = masters[0] if is_flat else masters[number]
            moments = {key: m for key, m in optimizer.state.get(master, {}).items() if key in ADAM_MOMENTS}
            pieces = {"weight": master.data, **moments}
            if is_flat:
                place = slice(start, start + parameter.numel())
                pieces = {key: piece[place].view(parameter.shape) for key, piece in pieces.items()}
            start += parameter.numel()
            yield parameter, pieces
