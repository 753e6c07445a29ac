"""The steps in plain PyTorch: one process, one batch, torch's AdamW, its own loss. Knows nothing of the engines."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.verify.small import TRAIN, batch_of, small_model
from mellow_ds.verify.steps import examples_of, learning_rate_of


@dataclass
class Trajectory:
    """What a training came to."""

    losses: list[float] = field(default_factory=list)  # mean over the answer tokens, by step
    grad_norms: list[float] = field(default_factory=list)  # before clipping
    # numpy: torch's tensors cannot be sent by a process that ends
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # trained ones, in the end
    fixed: dict[str, np.ndarray] = field(default_factory=dict)  # frozen ones and buffers, in the end


def train_plainly(num_steps: int, seed: int) -> Trajectory:
    """Train the small model; every step is one batch of all its examples."""
    model = small_model(seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if p.ndim > 1 and "embed" not in name]
    plain = [p for name, p in trained.items() if p.ndim < 2 or "embed" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": TRAIN.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    )
    found = Trajectory()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(step)
        loss = plain_loss(model, examples_of(step))
        optimizer.zero_grad()
        loss.backward()
        found.losses.append(loss.item())
        found.grad_norms.append(float(nn.utils.clip_grad_norm_(list(trained.values()), TRAIN.max_grad_norm)))
        optimizer.step()
    found.weights = arrays(trained.items())
    return found


def arrays(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Copies of named tensors on the CPU."""
    return {name: tensor.detach().cpu().clone().numpy() for name, tensor in tensors}


def plain_loss(model: MellowForConditionalGeneration, numbers: list[int]) -> torch.Tensor:
    """Cross entropy of the logits of all positions, each predicting the next one's label: mean over answer tokens."""
    batch = batch_of(numbers, model.num_audio_tokens)
    inputs = {**batch.model_inputs(), "labels": None, "use_cache": False}
    logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())


def largest_relative(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Largest difference over the numbers, each relative to what was wanted; infinite where one is not a number."""
    return largest(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def largest(differences: Iterable[float]) -> float:
    """The largest; infinite where one is not a number (which Python's `max` may pass over)."""
    return max(math.inf if math.isnan(difference) else difference for difference in differences)
