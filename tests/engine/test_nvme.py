"""Weights and optimizer state on a disk (ZeRO-3's offload to NVMe): steps, a save, steps after it, and a resume.

It needs DeepSpeed's async_io, which is compiled for two to five minutes on first use. So this runs where that was done
before, and compiles it itself only where it is asked to (libaio-dev, a compiler and ninja must be there):

    MELLOW_TEST_COMPILE=1 bash tests/run.sh tests/engine/test_nvme.py
"""

from pathlib import Path

import pytest
import torch

from mellow_ds.checkpoint.load import load_checkpoint, load_model_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.engine.ops import ASYNC_IO
from mellow_ds.engine.step import StepEngine
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.verify.small import small_model
from mellow_ds.world import World
from tests.checkpoint.saving import save_step
from tests.engine.cases import EXAMPLES, make_engine, reference, train, with_train
from tests.engine.compiling import need
from tests.ranks import run_ranks


def wide_model(seed: int) -> MellowForConditionalGeneration:
    """Of more than a megabyte a rank: DeepSpeed leaves less in memory."""
    return small_model(seed, width=256, vocabulary=4000)


def on_disk(model: torch.nn.Module, world: World, disk: Path, *what: str) -> StepEngine:
    options = {name: {"device": "nvme", "nvme_path": str(disk), "pin_memory": False} for name in what}
    return make_engine("deepspeed", model, 3, world, config=with_train(frozen_whole_megabytes=0), **options)


def check(world: World, folder: Path) -> None:
    losses, norms, weights = reference(make=lambda: wide_model(seed=1))
    tokens = wide_model(seed=1).num_audio_tokens
    for what in (("offload_optimizer",), ("offload_optimizer", "offload_param")):
        disk = folder / what[-1]
        disk.mkdir(exist_ok=True)
        engine = on_disk(wide_model(seed=1), world, disk, *what)
        before = train(engine, tokens, world, 2, EXAMPLES[:2])
        saved = save_step(CheckpointStore(disk / "checkpoints", 1, Peers(world, engine.device)), 2, engine, {})
        after = train(engine, tokens, world, 2, EXAMPLES[2:])
        assert sum(file.stat().st_size for file in disk.rglob("*.swp")) > 3 * 4e6  # weights and two moments
        engine.close()
        model = wide_model(seed=77)
        load_model_weights(model, saved)
        engine = on_disk(model, world, disk, *what)
        for _ in range(2):  # what was loaded is replaced as well
            load_checkpoint(saved, engine, world)
        assert train(engine, tokens, world, 2, EXAMPLES[2:]) == after
        torch.testing.assert_close(before[0] + after[0], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(before[1] + after[1], norms, rtol=1e-5, atol=0)
        for state in engine.parameter_states():
            torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-3)
        engine.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_whose_state_is_on_a_disk_is_saved_and_resumed(tmp_path: Path) -> None:
    need(ASYNC_IO)
    run_ranks(2, check, tmp_path, seconds=200)
