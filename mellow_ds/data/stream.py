"""Streams of batches: the training stream, which is exact and resumable, and the evaluation stream.

What a stream yields is a function of (shards, configuration, step, world); loader processes only prepare it ahead.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from mellow_ds.config.schema import DataConfig
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.batch import Batch
from mellow_ds.data.examples import BatchBuilder, EvalExample, LoadedBatch, LoadStats
from mellow_ds.data.kinds import kinds_from_config
from mellow_ds.data.loader import OrderedLoader
from mellow_ds.data.mixture import epochs_from_config
from mellow_ds.data.order import (
    BatchPlan,
    Epochs,
    Order,
    examples_of_rank,
    micro_batches,
    rank_slice,
    steps_per_epoch,
)
from mellow_ds.data.reader import ShardReader
from mellow_ds.errors import ConfigError, ShardError
from mellow_ds.prompt import Layout
from mellow_ds.world import World

_log = logging.getLogger("mellow_ds.data")
_ENDLESS = 2**62  # more steps than any run has
_STEPS_BETWEEN_LOOKS = 8
_LOOKS_AHEAD = 12  # 1, 2, 4, ... 2048 steps
_MAX_NAMED = 5  # kinds and shards of bad samples in a message
_MIN_JUDGED_SAMPLES = 1000  # one bad sample among the first few is no fraction yet


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in one optimizer step."""

    step: int  # from 0, over the whole run
    epoch: int
    step_in_epoch: int
    micro_batches: tuple[Batch, ...]  # as many on every rank and in every step; some may be without examples
    stats: LoadStats
    state: dict[str, Any]  # of the stream once this step is done: what a checkpoint stores


class TrainStream:
    """The optimizer steps of a run, on one rank, epoch after epoch, from `start_step` to `end_step`."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: Any,
        layout: Layout,
        data: DataConfig,
        train: TrainConfig,
        world: World,
        start_step: int = 0,
        end_step: int | None = None,
        state: dict[str, Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        """`state`, from `StepBatches.state` or `state()` of an earlier run, takes the place of `start_step`.

        `end_step` (exclusive) None: endless. Raises `ShardError` where `state` was made on other shards, and
        `ConfigError` where the settings that the order follows from have changed, or the global batch is too small.
        """
        self.plan = BatchPlan.from_config(train, world)
        self.epochs = epochs_from_config(reader, data, train.seed)
        self.kinds = kinds_from_config(reader, data)
        self.steps_per_epoch = steps_per_epoch(self.epochs.num_examples, self.plan.global_batch_size)
        self._fixed_state = _fixed_state(reader, data, train.seed, self.plan)
        if state is not None:
            _check_state(state, self._fixed_state)
            start_step = int(state["step"])
        self._step = start_step  # the next to come out
        self._end_step = _ENDLESS if end_step is None else end_step
        self._bad = _BadSamples(data.max_bad_fraction, reader.num_examples)
        self._reader, self._world = reader, world
        self._next_look = start_step  # at what remote shards the steps ahead read
        builder = BatchBuilder(
            reader, tokenizer, layout, data.clip_samples, train.seed,
            shuffle_options=data.shuffle_options, kinds=self.kinds,
        )  # fmt: skip
        parts = self.plan.micro_batches
        self._loader: OrderedLoader[LoadedBatch] = OrderedLoader(
            _TrainItems(builder, self.epochs, self.plan, world),
            range(start_step * parts, self._end_step * parts),
            train.num_workers,
            items_ahead=parts + train.num_workers,  # a whole step while one is computed
            pin_memory=pin_memory,
            slot_bytes=builder.waveform_bytes(train.batch_size),
        )

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        """The next step; raises `ShardError` for a bad sample past data.max_bad_fraction."""
        if self._step >= self._end_step:
            self.close()
            raise StopIteration
        self._fetch_ahead()
        loaded = [next(self._loader) for _ in range(self.plan.micro_batches)]
        stats = sum((part.stats for part in loaded), LoadStats())
        self._bad.count(stats)
        epoch, step_in_epoch = divmod(self._step, self.steps_per_epoch)
        step = self._step
        self._step += 1
        batches = tuple(part.batch for part in loaded)
        return StepBatches(step, epoch, step_in_epoch, batches, stats, self.state())

    def _fetch_ahead(self) -> None:
        """Let remote shards come before they are read: those of this step, of the next, and ever farther ones."""
        if not self._reader.is_remote or self._step < self._next_look:
            return
        self._next_look = self._step + _STEPS_BETWEEN_LOOKS
        found: list[int] = []
        for ahead in (0, *(2**n for n in range(_LOOKS_AHEAD))):
            step = min(self._step + ahead, self._end_step - 1)
            found += _examples_of(self.epochs, self.plan, step, self._world)[:, 0].tolist()
        self._reader.prefetch(found)

    def state(self) -> dict[str, Any]:
        """Where the next step stands, as plain values: what has come out, not what was prepared ahead."""
        epoch, step_in_epoch = divmod(self._step, self.steps_per_epoch)
        return {"step": self._step, "epoch": epoch, "step_in_epoch": step_in_epoch, **self._fixed_state}

    def close(self) -> None:
        """End the loader processes; say what was left out."""
        self._loader.close()
        self._bad.report()

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EvalStream:
    """A rank's share of the examples for evaluation, each once over the world, in batches.

    All ranks get the same number of batches, so that engines whose ranks must run together can; the last may be empty.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: Any,
        layout: Layout,
        data: DataConfig,
        batch_size: int,
        world: World,
        max_examples: int = 0,
        silence_audio: bool = False,
        with_answers: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`max_examples` 0: all. `with_answers`: rows with labels, for a loss; else left-padded rows for generation."""
        self.num_examples = min(max_examples or reader.num_examples, reader.num_examples)  # over all ranks
        rank_size = -(-self.num_examples // world.size)
        self.num_batches = -(-rank_size // batch_size)  # of every rank
        order = Order(reader.num_questions, shuffle=False)
        places = examples_of_rank(order, self.num_examples, 0, 0, world.rank, world.size)
        builder = BatchBuilder(reader, tokenizer, layout, data.clip_samples, None, with_answers, silence_audio)
        self._bad = _BadSamples(0.0, reader.num_examples)
        self._loader: OrderedLoader[LoadedBatch] = OrderedLoader(
            _EvalItems(builder, places, self.num_batches),
            range(self.num_batches),
            num_workers,
            items_ahead=2 * num_workers,
            pin_memory=pin_memory,
            slot_bytes=builder.waveform_bytes(batch_size),
        )

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Batch, list[EvalExample]]]:
        """Batches with what is known of their rows; once. Raises `ShardError` at the first bad sample."""
        try:
            for loaded in self._loader:
                self._bad.count(loaded.stats)
                yield loaded.batch, list(loaded.examples)
        finally:
            self.close()

    def close(self) -> None:
        """End the loader processes."""
        self._loader.close()


@dataclass(frozen=True)
class _TrainItems:
    """Micro-batch number i of the run: part i % A of step i // A."""

    builder: BatchBuilder
    epochs: Epochs
    plan: BatchPlan
    world: World

    def __call__(self, number: int) -> LoadedBatch:
        step, part = divmod(number, self.plan.micro_batches)
        places = _examples_of(self.epochs, self.plan, step, self.world)
        return self.builder.build(micro_batches(places, self.plan.micro_batches)[part])


def _examples_of(epochs: Epochs, plan: BatchPlan, step: int, world: World) -> np.ndarray:
    """[n, 3] a rank's part of step number `step` of the run (see `examples_of_rank`)."""
    size = plan.global_batch_size
    epoch, step_in_epoch = divmod(step, steps_per_epoch(epochs.num_examples, size))
    return examples_of_rank(epochs, size, epoch, step_in_epoch, world.rank, world.size)


@dataclass(frozen=True)
class _EvalItems:
    """Batch number i of a rank."""

    builder: BatchBuilder
    places: np.ndarray  # [n, 3]
    num_batches: int

    def __call__(self, number: int) -> LoadedBatch:
        return self.builder.build(self.places[rank_slice(len(self.places), number, self.num_batches)])


class _BadSamples:
    """Counts samples that could not be used, says so at a limited rate, and stops past a fraction."""

    def __init__(self, max_fraction: float, num_examples: int) -> None:
        self._max_fraction = max_fraction
        self._min_judged = min(_MIN_JUDGED_SAMPLES, num_examples)
        self._num_samples = 0
        self._num_bad = 0
        self._by_kind: Counter[str] = Counter()  # of bad ones, by kind and shard

    def count(self, stats: LoadStats) -> None:
        """Take the counts of a step; raise `ShardError` past the fraction."""
        self._num_samples += stats.num_samples
        for error in stats.bad_samples:
            self._num_bad += 1
            self._by_kind[f"{error.kind} in {error.place.shard}"] += 1
            if self._max_fraction == 0:
                raise error
            if self._num_bad & (self._num_bad - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                _log.warning("left out bad sample number %d (%s): %s", self._num_bad, error.kind, error)
            if self._num_bad > self._max_fraction * max(self._num_samples, self._min_judged):
                raise ShardError(
                    f"{self._num_bad} of {self._num_samples} samples read were bad, more than data.max_bad_fraction "
                    f"({self._max_fraction}) allows ({self.summary()}); the last: {error}"
                )

    def report(self) -> None:
        """Say once what was left out."""
        if self._by_kind:
            _log.warning("samples left out on this rank: %s", self.summary())
            self._by_kind.clear()

    def summary(self) -> str:
        """How many of what kind in which shard, the most frequent first; empty where all were good."""
        found = [f"{count} x {name}" for name, count in self._by_kind.most_common(_MAX_NAMED)]
        others = len(self._by_kind) - len(found)
        return ", ".join(found) + (f" and {others} more" if others > 0 else "")


def _fixed_state(reader: ShardReader, data: DataConfig, seed: int, plan: BatchPlan) -> dict[str, Any]:
    """The part of the state that stays: all that the order of the examples follows from."""
    mixture = [
        f"{len(part.shards)} folders with " + (f"weight {part.weight:g}" if part.weight else f"epochs {part.epochs:g}")
        for part in data.mixture
    ]
    return {
        "fingerprint": reader.fingerprint,
        "seed": seed,
        "global_batch_size": plan.global_batch_size,
        "shuffle": data.shuffle,
        "shuffle_window": data.shuffle_window,
        "order_runs": data.order_runs,
        "questions_per_clip": data.questions_per_clip,
        "shuffle_options": data.shuffle_options,
        "mixture": mixture,
    }


def _check_state(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise where a stream with the state `own` would not go on where the one with `state` stopped."""
    if state["fingerprint"] != own["fingerprint"]:
        raise ShardError(
            f"data.shards have the fingerprint {own['fingerprint']}, but the run to go on with was trained on "
            f"{state['fingerprint']}: name the shards that it was started with (or the data.datafiles and audio that "
            "they are packed from), or start a new run"
        )
    sections = {"seed": "train", "global_batch_size": "train"}
    for name, value in own.items():
        if state.get(name) != value:
            raise ConfigError(
                f"{sections.get(name, 'data')}.{name} is {value}, but the run to go on with has {state.get(name)}: "
                "which examples are left follows from it; set it back, or start a new run"
            )
