"""What a rank of the checkpoint benchmark does: train, save in the background and not, and time all of it."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.distributed as dist
import workload
from project_side import (
    build_project_models,
    choose_sizes,
    compact_layout,
    draw_waveforms,
    project_batch,
    recipe_config,
)

from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.data.batch import Batch
from mellow_ds.ds_config import StepShape, read_engine_json
from mellow_ds.engine.build import build_engine
from mellow_ds.engine.process_group import start_process_group, stop_process_group
from mellow_ds.engine.protocol import Engine
from mellow_ds.world import World

TOKENS = 33  # a clip


def run_rank(rank: int, port: int, folder: Path, options: argparse.Namespace, results: Any) -> None:
    """Join the others, run the rounds, put what rank 0 measured into the queue `results`."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(options.ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    world = World.from_env()
    device = start_process_group(world, "gloo")
    run = _Run(world, device, folder, options)
    found = [run.round(number) for number in range(-1, options.rounds)][1:]  # the first of each is slower
    run.engine.close()
    stop_process_group()
    if world.is_main:
        size = {"num_bytes": run.num_bytes, "num_parameters": run.num_parameters}
        results.put({"engine": run.engine.name, **size, "rounds": found})


class _Run:
    """A training run without a data room: batches made here, an engine and a store as `cli/training.py` builds them."""

    def __init__(self, world: World, device: torch.device, folder: Path, options: argparse.Namespace) -> None:
        sizes = choose_sizes(options.tiny, options.layers)
        model = build_project_models(sizes, options.seed)[TOKENS]
        config = recipe_config(sizes)
        shape = StepShape(
            world.size, 1, 1, config.train.max_grad_norm, config.train.learning_rate, config.train.weight_decay,
            "float32",
        )  # fmt: skip
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.num_bytes = 0
        self._device = device
        self._steps = options.steps
        # one clip and a short answer, so that a round has many steps in its time
        examples = [e for e in workload.draw_examples(64, options.seed, sizes.vocab_size) if e.num_clips == 1]
        example = min(examples, key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
        waveforms = draw_waveforms(1, config.data.clip_samples, options.seed)
        self._batch: Batch = project_batch([example], waveforms, compact_layout(model))
        engine_json = read_engine_json(str(measuring.engine_json(options.stage)))
        self.engine: Engine = build_engine(options.engine, model.train(), engine_json, shape, config.train, device)
        self._store = CheckpointStore(folder, 1, Peers(world, device))
        self._step = 0

    def round(self, number: int) -> dict[str, Any]:
        """Steps without a save, steps around one that is waited for, steps around one in the background."""
        plain = self._steps_seconds()
        started = time.perf_counter()
        outcome = self._save_begun() or self._store.wait()
        waited = time.perf_counter() - started
        assert outcome is not None
        assert not outcome.error, outcome.error
        self.num_bytes = outcome.num_bytes
        started = time.perf_counter()
        self._save_begun()
        blocked = time.perf_counter() - started
        beside = self._steps_seconds()
        started = time.perf_counter()
        self._store.wait()
        rest = time.perf_counter() - started
        return {
            "round": number,
            "steps": plain,
            "synchronous_save": waited,
            "asynchronous_save": blocked,
            "steps_beside_it": beside,
            "left_after_them": rest,
        }

    def _save_begun(self) -> Any:
        self._step += 1
        return self._store.begin(self._step, self.engine, {"num_updates": self._step})

    def _steps_seconds(self) -> list[float]:
        """Optimizer steps, with the all-reduce that ends each and carries the votes on a save."""
        seconds = []
        for _ in range(self._steps):
            started = time.perf_counter()
            self.engine.train_step([self._batch], 1e-4, 0.5)
            totals = torch.tensor(self._store.vote(), device=self._device)
            dist.all_reduce(totals)
            self._store.settle(*totals.tolist())
            seconds.append(time.perf_counter() - started)
        return seconds
