"""Parameter groups and the torch optimizers; which fused form is taken is said by name."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mellow_ds.config.schema import TrainConfig

NO_DECAY_MODULES = (nn.LayerNorm, nn.Embedding, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: with weight decay, and without (biases, norms, embeddings).

    A tied weight counts once, as the embedding that it is. RMSNorm has many class names; what names them all is one
    dimension, as it does biases.
    """
    undecayed: set[int] = set()
    for module in model.modules():
        if isinstance(module, NO_DECAY_MODULES):
            undecayed.update(id(parameter) for parameter in module.parameters(recurse=False))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in trained:
        # ds_shape: under ZeRO-3 a partitioned parameter has lost its own shape
        num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (plain if id(parameter) in undecayed or num_dimensions < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def torch_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> tuple[torch.optim.Optimizer, str]:
    """torch's AdamW or Adam in its fused form, and its name for the log."""
    classes = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
    optimizer = classes[config.optimizer_type](
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    )
    return optimizer, f"torch fused {config.optimizer_type}"


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """2-norm over all gradients, for engines that do not tell it; `inf` where one is not finite."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    return norm if math.isfinite(norm) else math.inf
