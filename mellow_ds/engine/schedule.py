"""Learning rate and clipping threshold of each optimizer step."""

import math
from dataclasses import dataclass

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.errors import ConfigError

_RUNNING_MEAN_DECAY = 0.99  # weight of the past in the running mean of gradient norms: about 100 steps
_LOSS_DECAY = 0.9  # smoothing of the loss that loss_tracking watches: single batches are too noisy


class Schedule:
    """The learning rate as a function of the step; `loss_tracking` alone also depends on the losses seen."""

    def __init__(self, config: TrainConfig, total_steps: int) -> None:
        if config.warmup_steps and config.warmup_steps >= total_steps:
            raise ConfigError(
                f"train.warmup_steps is {config.warmup_steps}, but the run has only {total_steps} steps: lower it"
            )
        self._config = config
        self._total_steps = total_steps
        self._plateau = _Plateau()

    def learning_rate(self, step: int) -> float:
        """For the optimizer step `step` (0 is the first)."""
        config = self._config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        done = step - config.warmup_steps
        span = max(self._total_steps - config.warmup_steps, 1)
        floor, peak = config.min_learning_rate, config.learning_rate
        if config.scheduler == "linear":
            return peak + (floor - peak) * min(done / span, 1.0)
        if config.scheduler == "cosine":
            return floor + (peak - floor) * _half_cosine(min(done / span, 1.0))
        if config.scheduler == "cosine_restarts":
            return floor + (peak - floor) * _half_cosine(done % config.restart_steps / config.restart_steps)
        if config.scheduler == "step":
            return peak * config.decay_factor ** (done // config.decay_steps)
        if config.scheduler == "loss_tracking":
            return max(peak * config.decay_factor**self._plateau.num_decays, floor)
        return peak

    def observe(self, loss: float) -> None:
        """Tell the loss of the step that was just taken."""
        if self._config.scheduler == "loss_tracking" and math.isfinite(loss):
            self._plateau = self._plateau.after(loss, self._config.decay_steps)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        plateau = self._plateau
        return {
            "smoothed": plateau.smoothed,
            "best": plateau.best,
            "steps_since_best": plateau.steps_since_best,
            "num_decays": plateau.num_decays,
        }

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self._plateau = _Plateau(
            state["smoothed"], state["best"], int(state["steps_since_best"]), int(state["num_decays"])
        )


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class _Plateau:
    """How long the smoothed loss has not improved."""

    smoothed: float = math.inf
    best: float = math.inf
    steps_since_best: int = 0
    num_decays: int = 0

    def after(self, loss: float, patience: int) -> "_Plateau":
        smoothed = loss if math.isinf(self.smoothed) else _LOSS_DECAY * self.smoothed + (1 - _LOSS_DECAY) * loss
        if smoothed < self.best:
            return _Plateau(smoothed, smoothed, 0, self.num_decays)
        if self.steps_since_best + 1 >= patience:
            return _Plateau(smoothed, self.best, 0, self.num_decays + 1)
        return _Plateau(smoothed, self.best, self.steps_since_best + 1, self.num_decays)


class ClipThreshold:
    """The norm at which gradients are clipped: `max_grad_norm`, or by choice a multiple of the running mean norm."""

    def __init__(self, config: TrainConfig) -> None:
        self._max_grad_norm = config.max_grad_norm
        self._factor = config.clip_to_running_mean
        self._mean = 0.0  # bias-corrected on reading, as in Adam
        self._num_norms = 0

    def threshold(self) -> float:
        """For the next step; 0 clips nothing."""
        limits = [self._max_grad_norm] if self._max_grad_norm else []
        if self._factor and self._num_norms:
            limits.append(self._factor * self._mean / (1 - _RUNNING_MEAN_DECAY**self._num_norms))
        return min(limits, default=0.0)

    def observe(self, grad_norm: float) -> None:
        """Tell the norm before clipping of the step that was just taken."""
        if self._factor and math.isfinite(grad_norm):
            self._mean = _RUNNING_MEAN_DECAY * self._mean + (1 - _RUNNING_MEAN_DECAY) * grad_norm
            self._num_norms += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"mean": self._mean, "num_norms": self._num_norms}

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self._mean, self._num_norms = state["mean"], int(state["num_norms"])
