"""Whole runs on a rank, by the real stream, trainer and checkpoints, noting what they did step by step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mellow_ds.checkpoint.load import load_checkpoint, load_model_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.snapshot import moment_name
from mellow_ds.checkpoint.step_folder import MODEL, OPTIMIZER
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.order import BatchPlan
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.stream import StepBatches, TrainStream
from mellow_ds.engine.protocol import Engine
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import FaultError
from mellow_ds.model.decoder import load_named_tokenizer
from mellow_ds.monitor.monitor import Monitor, StepRecord
from mellow_ds.prompt import Layout
from mellow_ds.stopping import StopRequest
from mellow_ds.trainer import Trainer
from mellow_ds.verify.back_ends import BackEnd
from mellow_ds.verify.corpus import Corpus
from mellow_ds.verify.small import small_model
from mellow_ds.world import World

NUM_STEPS = 8  # an epoch has 5, the last of 3 examples or so
TRAIN = TrainConfig(
    batch_size=3,  # so that the accumulation differs by world: 3 on one process, 2 on two, 1 on eight
    global_batch_size=9,
    max_steps=NUM_STEPS,
    learning_rate=5e-3,
    weight_decay=0.1,
    scheduler="cosine",
    warmup_steps=3,
    max_grad_norm=0.9,
    clip_to_running_mean=1.1,
    num_workers=0,
    save_every_steps=0,  # at its last step only
    seed=7,
)
_MAX_TOKENS = 64


@dataclass(frozen=True)
class Part:
    """One start of a run: from nothing or from a step folder to `last_step`, which is saved below `folder`."""

    back_end: BackEnd
    folder: Path
    last_step: int
    start: Path | None = None
    seed: int = 1  # of weights and generators, where nothing is loaded; the order of the examples does not depend on it
    dropout: float = 0.0


@dataclass
class Notes:
    """What a rank noted."""

    ids: list[tuple[str, ...]] = field(default_factory=list)  # of the examples, by step
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    saved: str = ""  # the folder of the last step


class _NotingMonitor(Monitor):
    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def step(self, record: StepRecord) -> None:
        self._notes.losses.append(record.loss)
        self._notes.learning_rates.append(record.learning_rate)


class _NotingStream:
    """The real stream, with what comes out of it noted."""

    def __init__(self, stream: TrainStream, notes: Notes) -> None:
        self._stream, self._notes = stream, notes
        self.steps_per_epoch, self.kinds = stream.steps_per_epoch, stream.kinds

    def __iter__(self) -> Iterator[StepBatches]:
        for step in self._stream:
            self._notes.ids.append(tuple(i for batch in step.micro_batches for i in batch.example_ids))
            yield step

    def state(self) -> dict[str, Any]:
        return self._stream.state()


def run_parts(world: World, parts: Sequence[Part], corpus: Corpus) -> list[Notes]:
    """On a rank: one after the other."""
    return [run_part(world, part, corpus) for part in parts]


def run_part(world: World, part: Part, corpus: Corpus) -> Notes:
    """As `mellow_ds.cli.training` does it. Raises `FaultError` where what was loaded is not what the files hold."""
    data, device = corpus.data_config(), torch.device("cpu")
    reader = ShardReader.from_config(data.shards, data)
    tokenizer = load_named_tokenizer(str(corpus.tokenizer), "tokenizer")
    model = small_model(part.seed, part.dropout, corpus.vocabulary)
    if part.start:
        load_model_weights(model, part.start)
    end_id = int(tokenizer.eos_token_id or 0)
    layout = Layout(model.num_audio_tokens, end_id, end_id, _MAX_TOKENS, _MAX_TOKENS)
    torch.manual_seed(part.seed * 100_003 + world.rank)
    engine = part.back_end.build(model, TRAIN, world, BatchPlan.from_config(TRAIN, world).micro_batches)
    state = load_checkpoint(part.start, engine, world) if part.start else None
    if part.start:
        _check_loaded(engine, part.start)
    notes = Notes()
    store = CheckpointStore(part.folder, 1, Peers(world, device))
    stream = TrainStream(
        reader, tokenizer, layout, data, TRAIN, world,
        end_step=part.last_step, state=state["stream"] if state else None,
    )  # fmt: skip
    with stream:
        trainer = Trainer(
            TRAIN, world, engine, _NotingStream(stream, notes), Schedule(TRAIN, NUM_STEPS), ClipThreshold(TRAIN), store,
            _NotingMonitor(notes), StopRequest(), part.last_step,
        )  # fmt: skip
        if state:
            trainer.restore(state)
        trainer.run()
    engine.close()
    notes.saved = str(store.folder_of(part.last_step))
    return notes


def _check_loaded(engine: Engine, folder: Path) -> None:
    """All that an engine has taken over is what the files of the step folder hold, bit for bit."""
    with TensorFiles(folder, MODEL) as weights, TensorFiles(folder, OPTIMIZER) as moments:
        for state in engine.parameter_states():
            _check_equal(state.name, state.weight, weights)
            for key, moment in state.moments.items():
                _check_equal(moment_name(state.name, key), moment.flatten(), moments)
        for name, tensor in engine.fixed_states():
            _check_equal(name, tensor, weights)


def _check_equal(name: str, found: torch.Tensor, files: TensorFiles) -> None:
    if not torch.equal(found, files.read(name)):
        raise FaultError(f"{name} was not taken over as {files.path} holds it")
