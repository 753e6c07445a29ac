"""A training run from its configuration: each part is built in a line or two, then the trainer runs."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mellow_ds.checkpoint import CheckpointStore, load_checkpoint, load_model_weights, read_state
from mellow_ds.cli.evaluation import evaluate_model
from mellow_ds.config.load import dump_run_config
from mellow_ds.config.schema import RunConfig
from mellow_ds.data.corpus import iterate_texts
from mellow_ds.data.mixture import epochs_from_config
from mellow_ds.data.order import BatchPlan, steps_per_epoch
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.stream import TrainStream
from mellow_ds.ds_config import StepShape, choose_precision, read_engine_json
from mellow_ds.engine.build import build_engine
from mellow_ds.engine.protocol import Engine
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import ConfigError
from mellow_ds.model.assemble import build_layout, build_model, load_tokenizer
from mellow_ds.model.fingerprint import check_features
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.processing import MellowProcessor, build_processor
from mellow_ds.monitor.monitor import open_monitor
from mellow_ds.prompt import Layout
from mellow_ds.stopping import StopRequest
from mellow_ds.trainer import Trainer, agreement
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


def train(config: RunConfig, world: World, device: torch.device, stop: StopRequest) -> int:
    """Train (or go on) as the configuration says; returns the exit code."""
    folder = Path(config.save_dir)
    reader = ShardReader.from_config(config.data.train_shards, config.data)
    checkpoints = CheckpointStore(
        folder / "checkpoints", config.train.keep_checkpoints, world, agreement(device),
        describe=lambda step_folder: parts.describe(step_folder),  # made below: they depend on what is found
    )  # fmt: skip
    resumed = _find_resumed(config, checkpoints, world, device)
    start_from = resumed or (Path(config.resume_checkpoint) if config.resume_checkpoint else None)
    parts = _build_parts(config, reader, folder, world, load_pretrained=start_from is None)
    _load_start(parts.model, start_from, reader)
    torch.manual_seed(config.train.seed * 100_003 + world.rank)  # dropout differs by rank, and follows from the seed

    plan = BatchPlan.from_config(config.train, world)
    engine = _build_engine(config, parts.model, plan, world, device)
    state = load_checkpoint(resumed, engine, world) if resumed else None
    epoch_steps = steps_per_epoch(epochs_from_config(reader, config.data, 0).num_examples, plan.global_batch_size)
    total_steps = config.train.max_steps or config.train.num_epochs * epoch_steps
    last_step = min(config.train.stop_at_step or total_steps, total_steps)
    stream = TrainStream(
        reader, parts.tokenizer, parts.layout, config.data, config.train, world,
        end_step=last_step, state=state["stream"] if state else None, pin_memory=device.type == "cuda",
    )  # fmt: skip
    start_step = int(state["progress"]["step"]) if state else 0
    monitor = open_monitor(
        world, folder, total_steps=last_step, log_every_steps=config.train.log_every_steps,
        resumed_step=start_step, cuda_index=device.index,
    )  # fmt: skip
    with monitor, stream:
        trainer = Trainer(
            config.train, world, engine, stream, Schedule(config.train, total_steps), ClipThreshold(config.train),
            checkpoints, monitor, stop, last_step,
        )  # fmt: skip
        if state:
            trainer.restore(state)
        if world.is_main:  # not before: a run that is refused leaves the configuration of the one that it is not
            (folder / "config.yaml").write_text(dump_run_config(config), encoding="utf-8")
        _say_what_runs(config, world, engine.name, parts.model, reader, plan, start_step, last_step)
        stop.listen()
        exit_code = trainer.run()
    if not exit_code and config.train.evaluate_at_end:
        with engine.whole_model() as whole:
            evaluate_model(
                whole, parts.tokenizer, parts.layout, config, world, device, folder / "evaluation", {"step": last_step}
            )
    engine.close()
    return exit_code


def _build_parts(config: RunConfig, reader: ShardReader, folder: Path, world: World, load_pretrained: bool) -> _Parts:
    tokenizer = _shared_tokenizer(config, reader, folder / "tokenizer", world)
    model = build_model(config.model, config.data, tokenizer, config.train.seed, load_pretrained)
    layout = build_layout(config.model, config.data, tokenizer, model.num_audio_tokens)
    return _Parts(model, tokenizer, layout, build_processor(model, tokenizer, layout))


def _load_start(model: MellowForConditionalGeneration, start_from: Path | None, reader: ShardReader) -> None:
    """Load the weights that the run goes on from or starts from; features must be those of the encoder in them."""
    if start_from:
        load_model_weights(model, start_from)
    if reader.features is not None:
        check_features(reader.features, model.encoder, model.config.encoder_config)


def _build_engine(
    config: RunConfig, model: MellowForConditionalGeneration, plan: BatchPlan, world: World, device: torch.device
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
    torch.nn.Module.to(model, device).train()
    return build_engine(config.engine, model, engine_json, shape, config.train, device)


def _shared_tokenizer(config: RunConfig, reader: ShardReader, saved: Path, world: World) -> object:
    """The run's tokenizer; rank 0 makes it where there is none and saves it, the others read what it saved.

    A run that starts from a checkpoint takes that one's: its weights know no other ids.
    """
    if world.is_main:
        started = Path(config.resume_checkpoint) if config.resume_checkpoint else saved
        has_own = (saved / _TOKENIZER_NAME).is_file() or not (started / _TOKENIZER_NAME).is_file()
        tokenizer = load_tokenizer(
            config.model, config.data, lambda: iterate_texts(reader), saved if has_own else started
        )
        tokenizer.save_pretrained(saved)
    dist.barrier()
    return load_tokenizer(config.model, config.data, saved=saved)


def _find_resumed(config: RunConfig, checkpoints: CheckpointStore, world: World, device: torch.device) -> Path | None:
    """The step folder to go on from: rank 0 chooses, as only it reads the files through, and tells the others."""
    newest = checkpoints.newest() if world.is_main else None
    step = torch.tensor(read_state(newest)["progress"]["step"] if newest else -1, device=device)
    dist.broadcast(step, src=0)
    if int(step) < 0:
        return None
    found = checkpoints.folder_of(int(step))
    if config.train.resume == "never":
        raise ConfigError(f"{found} is there and train.resume is never: choose another save_dir, or set resume to auto")
    _log.info("going on from %s", found)
    return found


def _say_what_runs(
    config: RunConfig,
    world: World,
    engine_name: str,
    model: torch.nn.Module,
    reader: ShardReader,
    plan: BatchPlan,
    start_step: int,
    last_step: int,
) -> None:
    num_clips = sum(manifest.num_clips for manifest in reader.manifests)
    # ds_numel: under ZeRO-3 a partitioned parameter is empty
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained = sum(number for number, requires_grad in counts if requires_grad)
    _log.info("%s on %d ranks (started by %s)", engine_name, world.size, world.launcher)
    _log.info(
        "%.1f M parameters, %.1f M trained; %d examples of %d clips",
        sum(number for number, _ in counts) / 1e6, trained / 1e6, reader.num_examples, num_clips,
    )  # fmt: skip
    _log.info(
        "steps %d to %d, %d examples a step in %d micro-batches of at most %d a rank; run folder %s",
        start_step, last_step, plan.global_batch_size, plan.micro_batches, config.train.batch_size, config.save_dir,
    )  # fmt: skip
