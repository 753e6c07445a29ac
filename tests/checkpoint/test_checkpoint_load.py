"""Taking up a step: all of it comes back, older formats too; what is foreign or of another model is refused by name."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mellow_ds.checkpoint.load import load_checkpoint, load_model_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.step_folder import MODEL
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.errors import CheckpointError
from mellow_ds.world import World
from tests.checkpoint.plain import STATE, PlainEngine
from tests.checkpoint.saving import save_step


class PlainModel(nn.Module):
    """What `PlainEngine` trains, with a tied name."""

    def __init__(self, sizes: tuple[int, ...] = (12, 6, 4)) -> None:
        super().__init__()
        for number, size in enumerate(sizes):
            self.register_parameter(f"w{number}", nn.Parameter(torch.zeros(2, size // 2)))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.register_buffer("buffer", torch.tensor(0))
        self.tied = self.w0


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    engine = PlainEngine(2, scaler={"cur_scale": 8.0})
    store = CheckpointStore(tmp_path, 1, Peers(World()))
    return save_step(store, 3, engine, {**STATE, "scaler": engine.scaler_state()})


def split_in_two(saved: Path) -> None:
    """Make the step one that two ranks wrote."""
    for stem in ("model", "optimizer"):
        whole = load_file(saved / f"{stem}.safetensors")
        (saved / f"{stem}.safetensors").unlink()
        files = {name: f"{stem}-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(whole))}
        for file in set(files.values()):
            save_file({name: whole[name] for name in whole if files[name] == file}, saved / file, {"format": "pt"})
        (saved / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("split", [False, True])
def test_everything_comes_back(saved: Path, split: bool) -> None:
    if split:
        split_in_two(saved)
    torch.manual_seed(1)
    engine = PlainEngine(9)
    state = load_checkpoint(saved, engine, World())
    assert state["progress"] == {"step": 3}
    assert engine.scaler == {"cur_scale": 8.0}
    assert {name: s.num_updates for name, s in engine.loaded.items()} == {"w0": 3, "w1": 4, "w2": 5}
    for number, state_of in enumerate(engine.loaded.values()):
        assert bool((state_of.weight == 2 + number).all())
        assert bool((state_of.moments["exp_avg"] == 2.25 + number).all())
        assert set(state_of.moments) == {"exp_avg", "exp_avg_sq"}
    model = PlainModel()
    load_model_weights(model, saved)
    assert bool((model.w1 == 3).all())
    assert bool((model.frozen == -2).all())
    assert int(model.buffer) == 7
    assert bool((model.tied == 2).all())


def test_random_states_come_back_and_new_ranks_have_their_own(tmp_path: Path) -> None:
    torch.manual_seed(5)
    saved = save_step(CheckpointStore(tmp_path, 1, Peers(World())), 1, PlainEngine(1), STATE)
    expected = torch.rand(3).tolist()
    drawn = []
    for seed in (6, 7):  # nothing of this start is in them
        for rank in (0, 1, 2):
            torch.manual_seed(seed)
            load_checkpoint(saved, PlainEngine(2), World(rank, 3))
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == expected
    assert len({tuple(numbers) for numbers in drawn[:3]}) == 3
    assert drawn[:3] == drawn[3:]


def of_older_format(moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Moments in the shape of their weight."""
    return {name.removesuffix("@0"): t.view(2, -1) if "exp_avg" in name else t for name, t in moments.items()}


def test_steps_of_the_second_format_are_read(saved: Path) -> None:
    moments = load_file(saved / "optimizer.safetensors")
    save_file(of_older_format(moments), saved / "optimizer.safetensors")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "format_version": 2}))
    test_everything_comes_back(saved, split=False)


def test_moments_in_parts_are_put_together(saved: Path) -> None:
    """They lie where the ranks had them, in any order; a lost one is found out."""
    moments = load_file(saved / "optimizer.safetensors")
    whole = moments.pop("w0::exp_avg@0")
    parts = {"w0::exp_avg@10": whole[10:], "w0::exp_avg@0": whole[:4] + 1, "w0::exp_avg@4": whole[4:10]}
    save_file({**moments, **parts}, saved / "optimizer.safetensors")
    engine = PlainEngine(0)
    load_checkpoint(saved, engine, World())
    found = engine.loaded["w0"].moments["exp_avg"]
    assert found.shape == (2, 6)
    assert torch.equal(found.flatten(), torch.cat([whole[:4] + 1, whole[4:]]))
    for lost, said in (
        ("@4", "lacks its part from 4 on"),
        ("@10", "has 10 numbers, its weight 12: the step is damaged"),
    ):
        rest = {name: part for name, part in parts.items() if not name.endswith(lost)}
        save_file({**moments, **rest}, saved / "optimizer.safetensors")
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(saved, PlainEngine(0), World())


def test_steps_of_the_first_format_are_read(saved: Path) -> None:
    """One count of updates, in state.json, for all parameters."""
    moments = of_older_format(load_file(saved / "optimizer.safetensors"))
    save_file({k: t for k, t in moments.items() if "num_updates" not in k}, saved / "optimizer.safetensors")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "format_version": 1, "num_updates": 17}))
    engine = PlainEngine(0)
    load_checkpoint(saved, engine, World())
    assert {state.num_updates for state in engine.loaded.values()} == {17}
    assert set(engine.loaded["w0"].moments) == {"exp_avg", "exp_avg_sq"}


def test_a_step_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is of another model shape: w1 is \[2, 3\] there"):
        load_model_weights(PlainModel((12, 8, 4)), saved)
    with pytest.raises(CheckpointError, match="it has w2, which the configured model has not"):
        load_model_weights(PlainModel((12, 6)), saved)
    with pytest.raises(CheckpointError, match=r"it lacks w3 \(1 names in all\)"):
        load_model_weights(PlainModel((12, 6, 4, 2)), saved)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.marker), 0o700)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "mp_rank_00_model_states.pt", "model.safetensors", "model.ckpt"])
def test_a_pickle_is_refused_by_name_and_not_opened(saved: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load_model_weights(PlainModel(), saved)
    assert ("is a pickle" in str(caught.value)) == (name != "model.safetensors")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"w0": "../../model.safetensors"}}', "only safetensors files beside it"),
        ('{"weight_map": {"w0": "evil.pt"}}', "names the file 'evil.pt'"),
        ('{"weight_map": ["w0"]}', "cannot be read"),
        ("{", "cannot be read"),
        ('{"weight_map": {"w0": "model.safetensors"}}', "differ in buffer"),
        ('{"weight_map": {"w0": "none.safetensors"}}', r"none\.safetensors cannot be read"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(saved: Path, content: str, message: str) -> None:
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_model_weights(PlainModel(), saved)


def test_one_tensor_is_read_at_a_time(saved: Path) -> None:
    """What is not asked for stays on the disk: a shape is known without the tensor."""
    with TensorFiles(saved, MODEL) as tensors:
        assert tensors.shape("w0") == (2, 6)
        assert sorted(tensors.names()) == ["buffer", "frozen", "w0", "w1", "w2"]
        assert tensors.read("w2").tolist() == [[4, 4], [4, 4]]
