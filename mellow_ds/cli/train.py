"""`train.py` and `mellow-ds train`: check what was given, then build the parts of a run and let the trainer run."""

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path

from mellow_ds.checkpoint.retention import published_steps
from mellow_ds.cli.arguments import parse_run_arguments
from mellow_ds.cli.packed import check_files, needs_packing, with_packed_shards
from mellow_ds.config.schema import RunConfig
from mellow_ds.data.shard_cache import ShardCache
from mellow_ds.data.shard_source import open_source
from mellow_ds.ds_config import check_optimizer, read_engine_json, zero_stage
from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, ConfigError, MellowError
from mellow_ds.launcher.lifeline import hold_on
from mellow_ds.log import ALIKE, append_to_log_file, setup_logging
from mellow_ds.monitor.heartbeat import one_line
from mellow_ds.stopping import StopRequest
from mellow_ds.world import World

_log = logging.getLogger("mellow_ds.cli")


def main(arguments: list[str] | None = None, program: str = "train.py", mode: str = "") -> int:
    """Run the command; returns its exit code. A mistake is one line on rank 0, a fault is heard from its rank."""
    world = World()
    checked = False
    try:
        world = World.from_env()
        setup_logging(world)
        config = parse_run_arguments(sys.argv[1:] if arguments is None else arguments, program, mode)
        check_inputs(config, world)
        checked = True
        return run(config, world)
    except MellowError as error:
        # before anything is started all ranks find the same mistake: one line is enough
        if world.is_main or checked:
            _say_error(world, str(error))
        return _failed(error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        _say_error(world, f"unexpected fault, see the traceback above: {one_line(error)}", traceback.format_exc())
        return _failed(EXIT_FAULT)


def check_inputs(config: RunConfig, world: World) -> None:
    """Everything that can be known to be wrong before torch is imported and a GPU is taken."""
    engine_json = read_engine_json(config.deepspeed_config)
    zero_stage(engine_json)
    check_optimizer(engine_json, config.train)
    _check_save_dir(Path(config.save_dir))
    if needs_packing(config):
        check_files(config)
    if config.mode == "train":
        if not needs_packing(config):
            _check_shards(config, config.data.train_shards, "data.shards")
        if config.train.global_batch_size and config.train.global_batch_size < world.size:
            raise ConfigError(
                f"train.global_batch_size is {config.train.global_batch_size}, but the run has {world.size} ranks: "
                "every rank needs at least one example; raise it or start fewer ranks"
            )
        if config.resume_checkpoint:
            _check_step_folder("resume_checkpoint", Path(config.resume_checkpoint))
        if config.train.evaluate_at_end or config.train.evaluate_every_steps:
            _check_shards(config, config.data.eval_shards, "data.eval_shards")
        return
    if not config.resume_checkpoint:
        raise ConfigError("mode evaluate_checkpoint needs --checkpoint_path, such as RUN/checkpoints/step-000200")
    if Path(config.resume_checkpoint).is_file():
        raise ConfigError(
            f"--checkpoint_path {config.resume_checkpoint} is a file: name a step folder; a checkpoint of the original "
            "Mellow is converted first with mellow-ds convert --from-mellow"
        )
    _check_step_folder("--checkpoint_path", Path(config.resume_checkpoint))
    if not config.data.eval_shards:
        what = "data.eval_shards is empty: what is scored are the examples of data.shards or data.datafiles"
        _log.warning(what, extra=ALIKE)
    if not needs_packing(config):
        _check_shards(config, config.data.eval_shards or config.data.train_shards, "data.eval_shards")


def _check_save_dir(folder: Path) -> None:
    """That the run folder can be made and written, by what the system says of it or of the nearest folder above it."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
    if not there.is_dir():
        raise ConfigError(f"save_dir {folder} cannot be made: {there} is a file; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"save_dir {folder} cannot be written: {there} is on a read-only disk or another user's; choose another one"
        )


def _check_step_folder(key: str, folder: Path) -> None:
    """That a step is named that is there, and no folder of steps; else those that are there are told."""
    inside = next((place for place in (folder, folder / "checkpoints") if published_steps(place)), None)
    if folder.is_dir() and inside is None:
        return  # what it holds is looked at where it is opened
    steps = published_steps(inside or folder.parent)
    what = "holds steps and is none" if inside else "is not there"
    there = f"; {steps[0].parent} has {', '.join(step.name for step in steps)}" if steps else ""
    raise ConfigError(f"{key} {folder} {what}: name a step folder of a run{there}")


def _check_shards(config: RunConfig, folders: tuple[str, ...], key: str) -> None:
    if not folders:
        files = " ".join(config.data.datafiles) or "FILE.json"
        root = config.data.datapath or "AUDIO_FOLDER"
        raise ConfigError(
            f"{key} is empty: pack once with `mellow-shards build --json {files} --audio-root {root} --out SHARDS`, "
            f"then give --{key} SHARDS"
        )
    for folder in folders:
        manifest = open_source(folder, ShardCache(config.data.cache_folder)).manifest
        rate = manifest.sample_rate
        if rate != config.data.sampling_rate:
            raise ConfigError(
                f"{folder} holds audio at {rate} Hz but data.sampling_rate is {config.data.sampling_rate}: set it to "
                f"{rate}, or pack with --sample-rate {config.data.sampling_rate}"
            )
        if manifest.features is not None:
            _check_features(config, folder)


def _check_features(config: RunConfig, folder: str) -> None:
    key = "train.phases" if config.train.phases else "model.encoder.freeze_audio_encoder_weights"
    if config.mode == "train" and config.trains_encoder:
        raise ConfigError(
            f"{folder} holds features of a frozen encoder, but {key} would train it: keep it frozen, or train on the "
            "shards of the audio"
        )
    if config.evaluation.compare_silence and (config.mode != "train" or config.train.evaluate_at_end):
        raise ConfigError(
            f"evaluation.compare_silence silences audio, but {folder} holds features: name the shards of the audio in "
            "data.eval_shards"
        )


def run(config: RunConfig, world: World) -> int:
    """Join the other ranks and do what `config.mode` says."""
    stop = StopRequest()
    if world.launcher != "none":
        hold_on(lambda: stop.exit_code)
    folder = Path(config.save_dir)
    log_file = None
    if world.is_main:
        with contextlib.suppress(OSError):  # `held_run_folder` says so, to all ranks, once they have met
            folder.mkdir(parents=True, exist_ok=True)
            log_file = folder / "log.txt"
    setup_logging(world, log_file)
    if needs_packing(config):
        config = with_packed_shards(config, world)
    stop.listen(interrupt=False)  # from here on a signal is heard before the first step; Ctrl-C ends the start at once
    # from here on torch is needed
    from mellow_ds.cli.evaluation import evaluate_checkpoint
    from mellow_ds.cli.run_folder import held_run_folder
    from mellow_ds.cli.training import train
    from mellow_ds.engine.memory import naming_memory
    from mellow_ds.engine.process_group import start_process_group, stop_process_group
    from mellow_ds.monitor.watchdog import group_timeout_seconds

    device = start_process_group(world, config.distributed_backend, group_timeout_seconds(config.train.hang_seconds))
    is_well = False
    try:
        with held_run_folder(config, world, device) as heartbeat, heartbeat.hearing_failures(), naming_memory():
            if config.mode == "evaluate_checkpoint":
                evaluate_checkpoint(config, world, device, heartbeat)
                exit_code = EXIT_DONE
            else:
                exit_code = train(config, world, device, stop, heartbeat)
        is_well = True
    finally:
        if is_well or world.size == 1:  # a rank that fails does not wait for the others to take their leave
            stop_process_group()
    return exit_code


def _failed(exit_code: int) -> int:
    """The code of a rank that fails. One that has met the others ends at once: threads of its process group, which is
    still open, could abort it while Python takes itself down, and launchers would hand on the code of that."""
    group = sys.modules.get("torch.distributed")
    if group is not None and group.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def _say_error(world: World, what: str, details: str = "") -> None:
    """The last line of a rank that fails, on stderr and, with what stands above it there, in the log of the run."""
    line = f"error: {f'rank {world.rank}: ' if world.size > 1 else ''}{what}"
    print(line, file=sys.stderr, flush=True)
    append_to_log_file(details + line)
