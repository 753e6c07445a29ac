"""The section `train` of the run configuration: how long, how fast, how often, and what is trained when.

Nothing here imports torch; values are checked on construction, as those of the other sections (`schema.py`) are.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from mellow_ds.config.checks import at_least, one_of
from mellow_ds.errors import ConfigError

PARTS = ("encoder", "projector", "decoder")
OPTIMIZERS = ("AdamW", "Adam", "Lamb", "Muon")
PYTORCH_OPTIMIZERS = ("Muon",)  # that the DeepSpeed back end has not: engine auto takes PyTorch's for them
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts", "step", "loss_tracking")


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """Number format of the matrix products. Weights of the optimizer stay float32."""

    use_mixed_precision: Literal["auto", "true", "false"] = "auto"
    """auto: on GPUs on, on CPUs off (bf16 products there are 5 to 30 times slower)."""
    mixed_precision_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """bfloat16, or float16 with dynamic loss scaling."""

    def __post_init__(self) -> None:
        one_of("train.mixed_precision", self, "use_mixed_precision", ("auto", "true", "false"))
        one_of("train.mixed_precision", self, "mixed_precision_dtype", ("bfloat16", "float16"))


@dataclass(frozen=True)
class PartRates:
    """Peak learning rates of the parts of the model, where they differ from train.learning_rate."""

    encoder: float = 0.0
    """0: train.learning_rate."""
    projector: float = 0.0
    """0: train.learning_rate."""
    decoder: float = 0.0
    """0: train.learning_rate; with LoRA that of the adapters."""

    def __post_init__(self) -> None:
        at_least("train.learning_rates", self, 0, *PARTS)


@dataclass(frozen=True)
class Phase:
    """What is trained from a step on."""

    from_step: int = 0
    """First optimizer step of the phase, counted from 0."""
    train: tuple[str, ...] = ()
    """The parts that are trained: encoder, projector, decoder."""

    def __post_init__(self) -> None:
        at_least("train.phases", self, 0, "from_step")
        unknown = [part for part in self.train if part not in PARTS]
        if unknown or not self.train:
            found = unknown[0] if unknown else "nothing"
            raise ConfigError(f"train.phases trains '{found}' from step {self.from_step}; name of {', '.join(PARTS)}")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, how often."""

    batch_size: int = 4
    """Examples of a micro-batch on one rank."""
    global_batch_size: int = 0
    """Examples of an optimizer step on all ranks; the accumulation follows. 0: batch size x world x accumulation."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step, where global_batch_size is 0."""
    num_epochs: int = 10
    """Epochs, where max_steps is 0."""
    max_steps: int = 0
    """Optimizer steps in all; 0: what num_epochs comes to."""
    stop_at_step: int = 0
    """Save and end at this step, with the schedule of the whole run; 0: do not. The next start goes on."""
    optimizer_type: Literal["AdamW", "Adam", "Lamb", "Muon"] = "AdamW"
    """AdamW; Adam with weight decay added to the gradient, as Mellow's; Lamb; Muon for matrices, AdamW for the rest."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    learning_rates: PartRates = field(default_factory=PartRates)
    muon_learning_rate: float = 0.02
    """Peak of the schedule for the matrices under Muon, whose updates have a size of their own."""
    phases: tuple[Phase, ...] = ()
    """Parts trained from a step on, in place of the freeze keys: [{from_step: 0, train: [projector]}, ...]."""
    weight_decay: float = 1e-4
    """Not applied to biases, norms and embeddings."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's running-average factors."""
    eps: float = 1e-8
    """Adam's denominator floor."""
    scheduler: str = "cosine"
    """constant, linear, cosine, cosine_restarts, step or loss_tracking; per optimizer step, after warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    min_learning_rate: float = 0.0
    """Where linear, cosine and loss_tracking end."""
    restart_steps: int = 1000
    """cosine_restarts: optimizer steps of a cycle."""
    decay_steps: int = 1000
    """step: optimizer steps between decays; loss_tracking: steps without a better loss before a decay."""
    decay_factor: float = 0.5
    """step and loss_tracking: what the learning rate is multiplied by."""
    max_grad_norm: float = 0.5
    """Clip the global gradient norm here; 0: do not."""
    clip_to_running_mean: float = 0.0
    """Also clip the norm at this many times its running mean; 0: do not."""
    num_workers: int = 2
    """Loader processes of a rank; 0: load in the training process."""
    seed: int = 1234
    """Everything random follows from it."""
    save_every_steps: int = 1000
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_best: Literal["", "loss", "eval_loss"] = ""
    """Also keep the checkpoint that is best by this: loss of the steps since the one before, or eval_loss."""
    async_save: bool = True
    """Go on training while a checkpoint is written; only the copy out of the device is waited for."""
    evaluate_every_steps: int = 0
    """Optimizer steps between measurements of the loss on data.eval_shards (eval_loss in metrics.jsonl); 0: none."""
    max_hours: float = 0.0
    """Save and stop with code 85 before this many hours of wall clock are over, to be started again; 0: no limit."""
    max_skipped_steps: int = 20
    """Steps in a row that may be skipped because a loss or gradient is not finite; past them the run ends."""
    hang_seconds: float = 600.0
    """Seconds without progress after which the run says which rank is behind, and ends; 0: never."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest complete checkpoint of the run folder; never: refuse a folder that has one."""
    log_every_steps: int = 10
    """Optimizer steps between records in metrics.jsonl and TensorBoard."""
    evaluate_at_end: bool = False
    """Evaluate on data.eval_shards after the last step."""
    activation_checkpointing: bool = False
    """Compute the activations of the decoder's blocks (and a trained encoder's) again in the backward pass."""
    compile: bool = False
    """Run the decoder's blocks through torch.compile."""
    sync_batchnorm: bool = True
    """BatchNorm of a trained encoder takes its statistics over the micro-batches of all ranks."""
    frozen_whole_megabytes: float = 512.0
    """Where parameters are sharded: a frozen part up to this size stays whole on every rank."""
    mixed_precision: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)

    def __post_init__(self) -> None:
        at_least(
            "train",
            self,
            1,
            "batch_size",
            "gradient_accumulation_steps",
            "num_epochs",
            "keep_checkpoints",
            "log_every_steps",
        )
        at_least("train", self, 1, "restart_steps", "decay_steps")
        at_least(
            "train",
            self,
            0,
            "global_batch_size",
            "max_steps",
            "stop_at_step",
            "weight_decay",
            "warmup_steps",
            "num_workers",
            "evaluate_every_steps",
            "max_hours",
            "max_skipped_steps",
            "hang_seconds",
            "frozen_whole_megabytes",
        )
        at_least(
            "train", self, 0, "max_grad_norm", "clip_to_running_mean", "save_every_steps", "min_learning_rate", "seed"
        )
        one_of("train", self, "scheduler", SCHEDULES)
        one_of("train", self, "optimizer_type", OPTIMIZERS)
        one_of("train", self, "resume", ("auto", "never"))
        one_of("train", self, "keep_best", ("", "loss", "eval_loss"))
        if self.keep_best == "eval_loss" and not self.evaluate_every_steps:
            raise ConfigError("train.keep_best is eval_loss, but train.evaluate_every_steps is 0: nothing measures it")
        if self.keep_best == "eval_loss" and self.save_every_steps % self.evaluate_every_steps:
            raise ConfigError(
                f"train.keep_best is eval_loss, but train.save_every_steps ({self.save_every_steps}) is no multiple of "
                f"train.evaluate_every_steps ({self.evaluate_every_steps}): some checkpoints would have none"
            )
        steps = [phase.from_step for phase in self.phases]
        if steps and (steps[0] or any(later <= earlier for earlier, later in pairwise(steps))):
            raise ConfigError(f"train.phases begin at steps {steps}; the first is 0, each later than the one before")
        for name in ("learning_rate", "muon_learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.decay_factor < 1:
            raise ConfigError(f"train.decay_factor is {self.decay_factor}; it must be between 0 and 1")
        if self.global_batch_size and self.gradient_accumulation_steps != 1:
            raise ConfigError(
                "train.global_batch_size and train.gradient_accumulation_steps are both given: "
                "the accumulation follows from the global batch; drop one of the two"
            )
        if self.max_steps and self.warmup_steps >= self.max_steps:
            raise ConfigError(
                f"train.warmup_steps is {self.warmup_steps}, but the run has only {self.max_steps} steps: lower it"
            )
