"""Parameter groups by part of the model and kind of parameter, and the torch optimizers, each said by name."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mellow_ds.config.train_keys import PARTS, TrainConfig
from mellow_ds.log import ALIKE

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam and its kin keep of a parameter, beside a count
MUON_MOMENTS = ("momentum_buffer",)
# tables that a module keeps as parameters of its own: biases of attention (HTSAT), positions and marks (AST, ViT)
_TABLES = ("bias", "bias_table", "pos_embed", "position_embeddings", "position_embedding", "cls_token",
           "distillation_token", "mask_token")  # fmt: skip
NO_DECAY_MODULES = (nn.LayerNorm, nn.Embedding, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_log = logging.getLogger("mellow_ds.engine")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trained parameters by part, and in each part with weight decay and without (biases, norms, embeddings).

    Keys of a group: `params`, `weight_decay`, `part`, `rate` (its learning rate over that of the schedule) and
    `use_muon` (the matrices, with train.optimizer_type Muon). A tied weight counts once, as the embedding that it is.
    RMSNorm has many class names; what names them all is one dimension, as it does biases. Embeddings and tables of
    biases that are no module of their own are known by name.
    """
    undecayed: set[int] = set()
    for module in model.modules():
        if isinstance(module, NO_DECAY_MODULES):
            undecayed.update(id(parameter) for parameter in module.parameters(recurse=False))
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ds_shape: under ZeRO-3 a partitioned parameter has lost its own shape
            num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            is_table = name.rpartition(".")[2].endswith(_TABLES)
            decays = id(parameter) not in undecayed and not is_table and num_dimensions >= 2
            use_muon = config.optimizer_type == "Muon" and decays and num_dimensions == 2
            groups.setdefault((name.partition(".")[0], decays, use_muon), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "part": part,
            "rate": _rate(config, part, use_muon),
            "use_muon": use_muon,
        }
        for (part, decays, use_muon), parameters in groups.items()
    ]


def _rate(config: TrainConfig, part: str, use_muon: bool) -> float:
    own = getattr(config.learning_rates, part) if part in PARTS else 0.0
    rate = (own or config.learning_rate) / config.learning_rate
    return rate * config.muon_learning_rate / config.learning_rate if use_muon else rate


def moment_names(group: dict[str, Any]) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter of a group."""
    return MUON_MOMENTS if group["use_muon"] else ADAM_MOMENTS


def torch_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> tuple[torch.optim.Optimizer, str]:
    """torch's AdamW or Adam in its fused form, and its name for the log. Lamb becomes AdamW, and it is said."""
    kind = config.optimizer_type
    if kind == "Lamb":
        what = "train.optimizer_type Lamb: no FusedLamb can be had here; torch fused AdamW takes its place"
        _log.warning(what, extra=ALIKE)
    chosen = torch.optim.Adam if kind == "Adam" else torch.optim.AdamW
    optimizer = chosen(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    return optimizer, f"torch fused {chosen.__name__}"


class OptimizerSet:
    """One or two torch optimizers that step together."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all, one after the other."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The live state of a parameter, in the optimizer that updates it."""
        for optimizer in self._optimizers:
            if any(parameter is own for group in optimizer.param_groups for own in group["params"]):
                return optimizer.state[parameter]
        raise KeyError("no optimizer updates this parameter")

    def step(self) -> None:
        """Update all parameters that have a gradient."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)


def torch_optimizers(groups: list[dict[str, Any]], config: TrainConfig) -> tuple[OptimizerSet, str]:
    """What torch has for train.optimizer_type, and its name for the log."""
    if config.optimizer_type != "Muon":
        optimizer, name = torch_optimizer(groups, config)
        return OptimizerSet([optimizer]), name
    matrices = [group for group in groups if group["use_muon"]]
    others = [group for group in groups if not group["use_muon"]]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.learning_rate))
    if others:
        optimizers.append(torch_optimizer(others, config)[0])
    return OptimizerSet(optimizers), "torch Muon with torch fused AdamW"


def gradient_norm(gradients: Iterable[torch.Tensor]) -> float:
    """2-norm over all of them; `inf` where one is not finite."""
    norms = [torch.linalg.vector_norm(gradient, dtype=_norm_type(gradient.device)) for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    return norm if math.isfinite(norm) else math.inf


def _norm_type(device: torch.device) -> torch.dtype:
    """What squares are summed up in. On CPUs torch sums float32 one after the other: off by 5e-4 for a million."""
    return torch.float64 if device.type == "cpu" else torch.float32
