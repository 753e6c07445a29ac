"""A step saved by any ZeRO stage goes on under any other, on another world, from another seed, with all that is frozen.

What goes on is held against plain PyTorch that nothing interrupted. A frozen weight and a buffer have values here that
no seed gives: where they did not come back, every loss would be another one.
"""

from pathlib import Path

import torch

from mellow_ds.checkpoint.load import load_checkpoint, load_model_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.snapshot import take_snapshot
from mellow_ds.checkpoint.step_folder import MODEL, OPTIMIZER
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.engine.protocol import Engine
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.verify.small import small_model
from mellow_ds.world import World
from tests.checkpoint.saving import save_step
from tests.engine.cases import EXAMPLES, make_engine, reference, train
from tests.ranks import run_ranks


def marked_model() -> MellowForConditionalGeneration:
    """The model of the run that is saved."""
    model = small_model(seed=1)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(0.5)
        for name, buffer in model.encoder.named_buffers():
            if name.endswith("running_mean"):
                buffer.fill_(0.25)
    return model


def step_of(folder: Path, stage: int, num_ranks: int) -> Path:
    return folder / f"zero{stage}-on-{num_ranks}" / "step-000002"


def check_shares(engine: Engine, world: World) -> None:
    """What a rank keeps of a save is what gathering everything gives; each tensor is kept once."""
    whole = {state.name: state for state in engine.parameter_states()}
    snapshot = take_snapshot(engine, world.rank, world.size)
    for name, tensor in snapshot.tensors[OPTIMIZER].items():
        parameter, key = name.split("::")
        if key != "num_updates":
            key, _, start = key.partition("@")
            wanted = whole[parameter].moments[key].flatten()[int(start) :][: len(tensor)]
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)
    for name, tensor in snapshot.tensors[MODEL].items():
        if name in whole:
            torch.testing.assert_close(tensor, whole[name].weight, rtol=0, atol=0)
    counts = [len(tensors) for tensors in snapshot.tensors.values()]
    found = torch.tensor([*counts, sum(t.nbytes for ts in snapshot.tensors.values() for t in ts.values())])
    torch.distributed.all_reduce(found)
    assert found.tolist() == [len(snapshot.owners[MODEL]), len(snapshot.owners[OPTIMIZER]), snapshot.num_bytes]
    assert max(snapshot.rank_bytes) < 0.8 * snapshot.num_bytes or world.size == 1


def save(world: World, folder: Path, stages: tuple[int, ...]) -> None:
    """Two steps under each of the stages, and a checkpoint."""
    for stage in stages:
        model = marked_model()
        audio_tokens = model.num_audio_tokens
        engine = make_engine("deepspeed", model, stage, world)
        train(engine, audio_tokens, world, 2, EXAMPLES[:2])
        check_shares(engine, world)
        target = step_of(folder, stage, world.size)
        assert save_step(CheckpointStore(target.parent, 1, Peers(world, engine.device)), 2, engine, {}) == target
        engine.close()


def go_on(world: World, folder: Path, saved_on: int, stages: tuple[tuple[int, int], ...]) -> None:
    """From the checkpoint of the first stage, under the second."""
    losses, norms, weights = reference(make=marked_model)
    for saved_stage, stage in stages:
        step = step_of(folder, saved_stage, saved_on)
        model = small_model(seed=77)
        state_dict = model.state_dict()
        tied = {name for name in state_dict if name not in dict(model.named_parameters()) and "lm_head" in name}
        with TensorFiles(step, MODEL) as tensors:  # nothing frozen and no buffer is left out, nothing stands twice
            assert sorted(tensors.names()) == sorted(state_dict.keys() - tied), step
        audio_tokens = model.num_audio_tokens
        load_model_weights(model, step)
        engine = make_engine("deepspeed", model, stage, world)
        load_checkpoint(step, engine, world)
        found_losses, found_norms = train(engine, audio_tokens, world, 2, EXAMPLES[2:])
        torch.testing.assert_close(found_losses, losses[2:], rtol=1e-5, atol=0)
        torch.testing.assert_close(found_norms, norms[2:], rtol=1e-5, atol=0)
        for state in engine.parameter_states():
            torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-4)
            assert state.num_updates == len(EXAMPLES)
        engine.close()


def save_on_one(world: World, folder: Path) -> None:
    save(world, folder, (0, 1, 2, 3))


def go_on_and_save_on_two(world: World, folder: Path) -> None:
    go_on(world, folder, 1, ((0, 1), (1, 2), (2, 3), (3, 0)))
    save(world, folder, (0, 1, 3))


def go_on_on_one(world: World, folder: Path) -> None:
    go_on(world, folder, 2, ((0, 3), (1, 0), (3, 2)))


def test_one_rank_to_two_and_two_to_one_under_other_stages(tmp_path: Path) -> None:
    run_ranks(1, save_on_one, tmp_path)
    run_ranks(2, go_on_and_save_on_two, tmp_path)
    run_ranks(1, go_on_on_one, tmp_path)
