"""A training run from its configuration: each part is built in a line or two, then the trainer runs."""

import gc
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mellow_ds.checkpoint.failure import reason_of
from mellow_ds.checkpoint.files_list import damage_of, flush, is_step_folder
from mellow_ds.checkpoint.load import check_adapters, load_checkpoint, load_model_weights, open_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.step_folder import read_state
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.cli.evaluation import evaluate_model, measure_engine
from mellow_ds.config.load import dump_run_config
from mellow_ds.config.schema import RunConfig
from mellow_ds.config.train_keys import PARTS
from mellow_ds.data.corpus import iterate_texts
from mellow_ds.data.mixture import epochs_from_config
from mellow_ds.data.order import BatchPlan, steps_per_epoch
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.stream import TrainStream
from mellow_ds.ds_config import StepShape, choose_precision, read_engine_json
from mellow_ds.engine.build import build_engine, shards_parameters
from mellow_ds.engine.protocol import Engine
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import EXIT_DONE, CheckpointError, ConfigError, FaultError
from mellow_ds.log import ALIKE
from mellow_ds.model.assemble import build_layout, build_model, load_tokenizer, unfrozen_parts
from mellow_ds.model.blocks import compile_blocks, recompute_activations
from mellow_ds.model.fingerprint import check_features
from mellow_ds.model.meta import DecoderWeights, ReadWeight, has_meta, lies_in_safetensors
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.norm import synchronise_batchnorm
from mellow_ds.model.processing import MellowProcessor, build_processor
from mellow_ds.monitor.heartbeat import Heartbeat
from mellow_ds.monitor.monitor import open_monitor
from mellow_ds.prompt import Layout
from mellow_ds.stopping import StopRequest, TimeBudget
from mellow_ds.trainer import Trainer
from mellow_ds.world import World

_log = logging.getLogger("mellow_ds.cli")
_TOKENIZER_NAME = "tokenizer_config.json"  # what a folder with a tokenizer holds


@dataclass(frozen=True)
class _Parts:
    """The model of a run with all that belongs to it."""

    model: MellowForConditionalGeneration
    tokenizer: Any
    layout: Layout
    processor: MellowProcessor

    def describe(self, step_folder: Path) -> None:
        """Make a step folder one that `from_pretrained` opens."""
        self.model.config.save_pretrained(step_folder)
        self.model.generation_config.save_pretrained(step_folder)
        self.processor.save_pretrained(step_folder)


def train(
    config: RunConfig, world: World, device: torch.device, stop: StopRequest, heartbeat: Heartbeat | None = None
) -> int:
    """Train (or go on) as the configuration says; returns the exit code.

    A phase ends with a checkpoint, and the next goes on from it as a run that is started again does: the parts that
    stay keep their optimizer state, on every back end.
    """
    reader = ShardReader.from_config(config.data.train_shards, config.data)
    plan = BatchPlan.from_config(config.train, world)
    epoch_steps = steps_per_epoch(epochs_from_config(reader, config.data, 0).num_examples, plan.global_batch_size)
    total_steps = config.train.max_steps or config.train.num_epochs * epoch_steps
    last_step = min(config.train.stop_at_step or total_steps, total_steps)
    budget = TimeBudget(config.train.max_hours, stop.started)
    run = _Run(config, world, device, stop, heartbeat or Heartbeat(), reader, plan, total_steps, last_step, budget)
    is_begun = False
    while True:
        exit_code, step = _train_phase(run, is_begun)
        if step >= last_step:
            return EXIT_DONE  # a run that is asked to stop in its last step has nothing left to do
        if exit_code:
            _log.warning("asked to stop after step %d; start again to go on", step, extra=ALIKE)
            return exit_code
        is_begun = True
        # models and engines hold themselves by cycles: two of them at a time may be more than there is memory for
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Run:
    """What all phases share."""

    config: RunConfig
    world: World
    device: torch.device
    stop: StopRequest
    heartbeat: Heartbeat
    reader: ShardReader
    plan: BatchPlan
    total_steps: int  # of the schedule
    last_step: int  # that this start takes
    budget: TimeBudget

    def phase(self, step: int) -> tuple[tuple[str, ...], int]:
        """(the parts that are trained from `step` on, the step where that ends)."""
        parts = unfrozen_parts(self.config.model)
        for phase in self.config.train.phases:
            if phase.from_step > step:
                return parts, min(phase.from_step, self.last_step)
            parts = phase.train
        return parts, self.last_step


def _train_phase(run: _Run, is_begun: bool) -> tuple[int, int]:
    """Build everything for the phase that the newest checkpoint stands in and train to its end: (exit code, step).

    `is_begun`: that checkpoint is of this start.
    """
    config, world, device, reader, heartbeat = run.config, run.world, run.device, run.reader, run.heartbeat
    folder = Path(config.save_dir)
    peers = Peers(world, device)
    checkpoints = CheckpointStore(
        folder / "checkpoints", config.train.keep_checkpoints, peers,
        describe=lambda step_folder: parts.describe(step_folder),  # made below: they depend on what is found
        keep_best=config.train.keep_best,
    )  # fmt: skip
    resumed = _find_resumed(config, checkpoints, is_begun)
    start_from = resumed or _named_start(config, peers)
    parts = _build_parts(config, reader, folder, world, start_from)
    if start_from:
        check_adapters(parts.model, start_from, goes_on=resumed is not None)
        load_model_weights(parts.model, start_from)
    if reader.features is not None:  # must be those of the encoder that has its weights now
        check_features(reader.features, parts.model.encoder, parts.model.config.encoder_config)
    start_step = int(read_state(resumed)["progress"]["step"]) if resumed else 0
    trained, end_step = run.phase(start_step)
    parts.model.set_trainable(trained)
    torch.manual_seed(config.train.seed * 100_003 + world.rank)  # dropout differs by rank, and follows from the seed
    heartbeat.beat()
    with _weights_on_demand(config, parts.model, start_from) as read_weight:
        engine = _build_engine(config, parts.model, run.plan, world, device, read_weight)
    heartbeat.beat()
    state = load_checkpoint(resumed, engine, world) if resumed else None
    stream = TrainStream(
        reader, parts.tokenizer, parts.layout, config.data, config.train, world,
        end_step=end_step, state=state["stream"] if state else None, pin_memory=device.type == "cuda",
    )  # fmt: skip
    monitor = open_monitor(
        world, folder, total_steps=run.last_step, log_every_steps=config.train.log_every_steps,
        resumed_step=start_step, cuda_index=device.index,
    )  # fmt: skip
    with monitor, stream:
        trainer = Trainer(
            config.train, world, engine, stream, Schedule(config.train, run.total_steps), ClipThreshold(config.train),
            checkpoints, monitor, run.stop, end_step, heartbeat,
            measure=lambda: measure_engine(engine, parts.tokenizer, parts.layout, config, world, heartbeat),
            budget=run.budget,
        )  # fmt: skip
        if state:
            trainer.restore(state)
        if world.is_main:  # not before: a run that is refused leaves the configuration of the one that it is not
            (folder / "config.yaml").write_text(dump_run_config(config), encoding="utf-8")
        _say_what_runs(run, engine.name, parts.model, start_step, end_step)
        run.stop.listen()
        exit_code = trainer.run()
    step = trainer.progress.step
    if step >= run.last_step and config.train.evaluate_at_end:
        in_step = engine.gathers_weights and not config.evaluation.gather_weights
        if in_step:
            _log.info(
                "each token gathers the weights once: evaluation.gather_weights true is faster where they fit on a rank"
            )
        with run.stop.at_once(), engine.model_in_step() if in_step else engine.whole_model() as model:
            evaluate_model(
                model, parts.tokenizer, parts.layout, config, world, device, folder / "evaluation",
                {"step": step}, heartbeat, in_step,
            )  # fmt: skip
    engine.close()
    return exit_code, step


def _build_parts(config: RunConfig, reader: ShardReader, folder: Path, world: World, start_from: Path | None) -> _Parts:
    tokenizer = _shared_tokenizer(config, reader, folder / "tokenizer", world)
    # where each rank keeps a share of the decoder, none reads the whole of it first
    engine_json = read_engine_json(config.deepspeed_config)
    on_meta = shards_parameters(config.engine, engine_json, config.train.optimizer_type) and (
        start_from is not None or lies_in_safetensors(config.model.decoder.text_decoder)
    )
    model = build_model(config.model, config.data, tokenizer, config.train.seed, start_from is None, on_meta)
    layout = build_layout(config.model, config.data, tokenizer, model.num_audio_tokens)
    return _Parts(model, tokenizer, layout, build_processor(model, tokenizer, layout))


@contextmanager
def _weights_on_demand(
    config: RunConfig, model: MellowForConditionalGeneration, start_from: Path | None
) -> Iterator[ReadWeight | None]:
    """What reads the parameters that are on the meta device, while it is open; None where there are none."""
    if not has_meta(model):
        yield None
    elif start_from is not None:
        with open_weights(model, start_from) as files:
            yield files.read
    else:
        yield DecoderWeights(model.decoder, config.model.decoder.text_decoder).read


def _build_engine(
    config: RunConfig,
    model: MellowForConditionalGeneration,
    plan: BatchPlan,
    world: World,
    device: torch.device,
    read_weight: ReadWeight | None,
) -> Engine:
    engine_json = read_engine_json(config.deepspeed_config)
    shape = StepShape(
        world_size=world.size,
        rank_batch_size=config.train.batch_size,
        accumulation=plan.micro_batches,
        max_grad_norm=config.train.max_grad_norm,
        learning_rate=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        precision=choose_precision(config.train.mixed_precision, engine_json, device.type == "cuda"),
    )
    if config.train.sync_batchnorm and world.size > 1:
        synchronise_batchnorm(model, dist.group.WORLD)
    if config.train.activation_checkpointing:
        recompute_activations(model)
    if config.train.compile:
        compile_blocks(model.decoder)
    torch.nn.Module._apply(model, lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    return build_engine(config.engine, model.train(), engine_json, shape, config.train, device, read_weight)


def _shared_tokenizer(config: RunConfig, reader: ShardReader, saved: Path, world: World) -> object:
    """The run's tokenizer; rank 0 makes it where there is none and saves it, the others read what it saved.

    A run that starts from a checkpoint takes that one's: its weights know no other ids. Once there, it is only read: a
    full disk or a kill leaves no half of it. Raises `FaultError` where it cannot be written.
    """
    if world.is_main and not (saved / _TOKENIZER_NAME).is_file():
        started = Path(config.resume_checkpoint) if config.resume_checkpoint else saved
        tokenizer = load_tokenizer(config.model, config.data, lambda: iterate_texts(reader), started)
        aside = saved.with_name(f".writing-{saved.name}")
        try:
            for old in (aside, saved):  # of a start that was cut off
                shutil.rmtree(old, ignore_errors=True)
            tokenizer.save_pretrained(aside)
            for path in (*aside.iterdir(), aside):
                flush(path)
            aside.rename(saved)
        except Exception as error:  # a library of Rust raises kinds of its own
            raise FaultError(f"{saved} cannot be written: {reason_of(error)}") from error
    dist.barrier()
    return load_tokenizer(config.model, config.data, saved=saved)


def _find_resumed(config: RunConfig, checkpoints: CheckpointStore, is_begun: bool) -> Path | None:
    """The step folder to go on from; the same on all ranks. `is_begun`: it is of this start."""
    found = checkpoints.newest()
    if found is None:
        return None
    if config.train.resume == "never" and not is_begun:
        raise ConfigError(f"{found} is there and train.resume is never: choose another save_dir, or set resume to auto")
    _log.info("going on from %s", found)
    return found


def _named_start(config: RunConfig, peers: Peers) -> Path | None:
    """The folder of `resume_checkpoint`; where it is a step folder, its files must be what was written."""
    if not config.resume_checkpoint:
        return None
    folder = Path(config.resume_checkpoint)
    # where one rank finds what was saved, all share the reading: hosts may see different disks
    is_model = peers.all_ok(not is_step_folder(folder))
    damage = "" if is_model else damage_of(folder, peers)
    if damage:
        raise CheckpointError(f"resume_checkpoint: {damage}; name another step folder")
    return folder


def _say_what_runs(
    run: _Run, engine_name: str, model: MellowForConditionalGeneration, start_step: int, end_step: int
) -> None:
    config, world, reader, plan = run.config, run.world, run.reader, run.plan
    num_clips = sum(manifest.num_clips for manifest in reader.manifests)
    # ds_numel: under ZeRO-3 a partitioned parameter is empty
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained = sum(number for number, requires_grad in counts if requires_grad)
    if config.keeps_random_encoder and reader.features is None:
        _log.warning(
            "the encoder is frozen and has no weights but random ones: name some by "
            "model.encoder.pretrained_audioencoder_path, or set model.encoder.freeze_audio_encoder_weights to false",
            extra=ALIKE,
        )
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks, started by {world.launcher}"
    _log.info("%s on %s", engine_name, ranks)
    _log.info(
        "%.1f M parameters, %.1f M trained (%s); %d examples of %d clips",
        sum(number for number, _ in counts) / 1e6, trained / 1e6,
        ", ".join(part for part in PARTS if part in model.trained_parts), reader.num_examples, num_clips,
    )  # fmt: skip
    _log.info(
        "steps %d to %d, %d examples a step in %d micro-batches of at most %d a rank; run folder %s",
        start_step, end_step, plan.global_batch_size, plan.micro_batches, config.train.batch_size, config.save_dir,
    )  # fmt: skip
