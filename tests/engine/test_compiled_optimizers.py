"""DeepSpeed's FusedAdam and CPUAdam, which are what runs beside a GPU, on a CPU: the steps of plain PyTorch, and each
goes on from the other's and torch's checkpoints.

They are compiled on first use, for two to three minutes on two cores, after which this environment has them. So this
runs where that was done before, and compiles them itself only where it is asked to:

    MELLOW_TEST_COMPILE=1 bash tests/run.sh tests/engine/test_compiled_optimizers.py
"""

from pathlib import Path

import pytest
import torch

from mellow_ds.checkpoint.load import load_checkpoint, load_model_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.engine import deepspeed_engine
from mellow_ds.engine.step import StepEngine
from mellow_ds.verify.small import small_model
from mellow_ds.world import World
from tests.checkpoint.saving import save_step
from tests.engine.cases import EXAMPLES, make_engine, reference, train
from tests.engine.compiling import need
from tests.engine.test_parts import check_phases
from tests.ranks import run_ranks

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = [(0, {}), (1, {}), (2, {}), (3, {}), (2, OFFLOAD), (3, {**OFFLOAD, "offload_param": {"device": "cpu"}})]
OURS = deepspeed_engine._build_optimizer  # torch's, on a CPU


def theirs(groups, engine_json, config, _stage):
    """What is taken where there is a GPU."""
    return deepspeed_engine._build_deepspeed_optimizer(groups, engine_json, config)


def build(world: World, stage: int, zero: dict, optimizer, seed: int = 1, start: Path | None = None) -> StepEngine:
    deepspeed_engine._build_optimizer = optimizer
    model = small_model(seed)
    if start:
        load_model_weights(model, start)
    engine = make_engine("deepspeed", model, stage, world, **zero)
    if start:
        load_checkpoint(start, engine, world)
    return engine


def check(world: World, folder: Path) -> None:
    losses, norms, weights = reference()
    tokens = small_model(1).num_audio_tokens
    for number, (stage, zero) in enumerate(CASES):
        for first, second in ((theirs, theirs), (theirs, OURS), (OURS, theirs)):
            engine = build(world, stage, zero, first)
            assert ("CPUAdam" if zero else "FusedAdam") in engine.name or first is OURS
            before = train(engine, tokens, world, 2, EXAMPLES[:2])
            store = CheckpointStore(folder / f"{number}-{first is OURS}-{second is OURS}", 1, Peers(world))
            start = save_step(store, 2, engine, {})
            engine.close()
            engine = build(world, stage, zero, second, seed=77, start=start)
            after = train(engine, tokens, world, 2, EXAMPLES[2:])
            torch.testing.assert_close([*before[0], *after[0]], losses, rtol=1e-5, atol=0)
            torch.testing.assert_close([*before[1], *after[1]], norms, rtol=1e-5, atol=0)
            for state in engine.parameter_states():
                torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-4)
                assert state.num_updates == len(EXAMPLES)
            engine.close()
    deepspeed_engine._build_optimizer = theirs
    check_phases(world, [("deepspeed", 1), ("deepspeed", 3)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_they_take_the_steps_of_plain_pytorch_and_go_on_from_one_another(tmp_path: Path) -> None:
    need("cpu_adam", "fused_adam")
    run_ranks(2, check, tmp_path)
