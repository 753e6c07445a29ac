"""What a rank hands to collectives: every one of them is seen where torch hands it to the process group.

DeepSpeed, FSDP2 and DDP (whose reducer is C++) all come through torch's `c10d` operators, which a dispatch mode sees.
Sizes are given in ring terms, as formulas of sharded training are: what a rank sends where a collective goes round in a
ring, whatever the backend really does.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mellow_ds.ds_config import StepShape
from mellow_ds.engine.build import build_engine
from mellow_ds.verify.small import TRAIN, small_model
from mellow_ds.verify.steps import examples_of, micro_batches
from mellow_ds.world import World

# turns of the ring: each rank sends (N - 1) / N of the tensor in a turn
_TURNS = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1, "broadcast": 1, "reduce": 1}
_KINDS = {  # operator of c10d -> (what it is, which argument holds the whole tensors)
    "allreduce_": ("allreduce", 0),
    "allreduce_coalesced_": ("allreduce", 0),
    "_allgather_base_": ("allgather", 0),
    "allgather_": ("allgather", 0),
    "allgather_coalesced_": ("allgather", 0),
    "allgather_into_tensor_coalesced_": ("allgather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}
_SILENT = ("barrier", "monitored_barrier_")  # send nothing worth counting


@dataclass(frozen=True)
class Transfer:
    """One collective."""

    kind: str  # a key of _TURNS
    dtype: str
    num_bytes: int  # of the whole tensor: the output of an all-gather, the input of a reduce-scatter

    def ring_bytes(self, world_size: int) -> float:
        """That a rank sends (where it is sent from or to one rank: on average over the ranks)."""
        return _TURNS[self.kind] * self.num_bytes * (world_size - 1) / world_size


class TrafficRecorder(TorchDispatchMode):
    """While it is entered, notes every collective of this thread (on CPUs that is where backward passes run too)."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if "c10d" in namespace:
            self._note(name.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        if name in _SILENT:
            return
        kind, place = _KINDS[name]  # an operator that is not known must not pass uncounted
        for tensor in _flat(args[place]):
            self.transfers.append(Transfer(kind, str(tensor.dtype).removeprefix("torch."), tensor.nbytes))


def _flat(values: Any) -> Iterable[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    else:
        for value in values:
            yield from _flat(value)


@dataclass(frozen=True)
class TrafficCase:
    """One way to take a step, whose bytes are counted."""

    name: str
    kind: str  # "deepspeed" or "fsdp"
    stage: int
    zero_options: dict[str, Any] = field(default_factory=dict)  # of "zero_optimization", beside the stage
    frozen_whole_megabytes: float = TRAIN.frozen_whole_megabytes
    gathers: int = 2  # of the weights in a micro-batch at stage 3
    all_reduces: bool = False  # ZeRO-1 and 2: every rank gets all gradients, not only its part
    accumulation: int = 1
    precision: str = "float32"


@dataclass(frozen=True)
class Sizes:
    """Numbers of the model, by what becomes of them."""

    trained: int
    root: int  # trained, outside of decoder blocks and projector: FSDP2 keeps them from forward to backward
    frozen: int
    tied: int = 0  # trained, used at both ends of the model

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """Before a back end has taken hold of the model."""
        trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        root = sum(n for name, n in trained.items() if ".layers." not in name and not name.startswith("projector."))
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        tied = sum(p.numel() for p in model.parameters() if p.requires_grad and uses[id(p)] > 1)
        return cls(sum(trained.values()), root, frozen, tied)


@dataclass(frozen=True)
class Measured:
    """Bytes of a step, of one rank, in ring terms."""

    found: float
    expected: float
    by_kind: dict[str, int]  # "allgather float32" -> bytes of the whole tensors
    on_loopback: float  # that went over the loopback in the step, by the kernel's count, divided by the ranks

    @property
    def difference(self) -> float:
        """Relative, of what was found from the formula."""
        return self.found / self.expected - 1 if self.expected else self.found


def expected_bytes(case: TrafficCase, sizes: Sizes, world_size: int) -> float:
    """The formula of docs/communication.md: that a rank sends in a step, in ring terms.

    An all-reduce is two turns, a reduce (scatter) or an all-gather one; in each, (N - 1) / N of the numbers are sent.
    """
    half = case.precision != "float32"
    weight = 2 if half else 4  # bytes of a number, as gathered
    gradient = 4 if case.kind == "fsdp" else weight  # FSDP2 and DDP reduce in float32
    a, kept = case.accumulation, case.stage < 2
    reduced = sizes.trained * gradient * (1 if kept else a)
    if case.stage == 0:
        sent = 2.0 * reduced
    elif case.kind == "deepspeed" and case.stage < 3:
        sent = reduced * (2 if case.all_reduces else 1) + sizes.trained * weight
    elif case.kind == "deepspeed":
        again = 2 * sizes.tied if case.gathers > 1 else 0  # freed between the uses, in both passes
        sent = reduced + a * (case.gathers * sizes.trained + again) * weight
    else:
        twice = sizes.trained - sizes.root if case.stage == 3 else 0
        sent = reduced + (sizes.trained + twice) * weight * (1 if kept else a)
    if not case.frozen_whole_megabytes and case.stage >= (3 if case.kind == "deepspeed" else 1):
        sent += sizes.frozen * weight * (1 if kept else a)  # forward only
    return sent * (world_size - 1) / world_size


def measure(world: World, cases: Sequence[TrafficCase], width: int, channels: tuple[int, ...]) -> list[Measured]:
    """On a rank: the third step of each case, when the back ends have found their ways."""
    return [_measure_case(world, case, width, channels) for case in cases]


def _measure_case(world: World, case: TrafficCase, width: int, channels: tuple[int, ...]) -> Measured:
    model = small_model(1, width=width, channels=channels)
    sizes, audio_tokens = Sizes.of(model), model.num_audio_tokens
    config = replace(TRAIN, frozen_whole_megabytes=case.frozen_whole_megabytes)
    shape = StepShape(
        world.size, config.batch_size, case.accumulation, config.max_grad_norm, config.learning_rate,
        config.weight_decay, case.precision,
    )  # fmt: skip
    engine_json = {"zero_optimization": {"stage": case.stage, **case.zero_options}}
    engine = build_engine(case.kind, model, engine_json, shape, config, torch.device("cpu"))
    for step in range(3):
        batches = micro_batches(examples_of(step), world, case.accumulation, audio_tokens)
        before = _loopback_bytes()
        with TrafficRecorder() as recorder:
            engine.train_step(batches, config.learning_rate, config.max_grad_norm)
        sent = _loopback_bytes() - before
    engine.close()
    by_kind: dict[str, int] = {}
    for transfer in recorder.transfers:
        name = f"{transfer.kind} {transfer.dtype}"
        by_kind[name] = by_kind.get(name, 0) + transfer.num_bytes
    found = sum(transfer.ring_bytes(world.size) for transfer in recorder.transfers)
    return Measured(found, expected_bytes(case, sizes, world.size), by_kind, sent / world.size)


def _loopback_bytes() -> int:
    """Sent so far over the loopback of this network namespace, once all ranks have come here; 0 where it is not told.

    Only in a namespace without other processes does a difference of two tell anything.
    """
    dist.barrier()
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sent = next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)
    dist.barrier()
    return sent
