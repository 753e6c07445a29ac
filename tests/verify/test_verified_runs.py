"""Runs in two pieces: they go on exactly, on the same world, on others and by other back ends; a wrong one is seen."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mellow_ds.errors import FaultError
from mellow_ds.verify import checkpoints, resume, runs
from mellow_ds.verify.back_ends import BACK_ENDS, BackEnd
from mellow_ds.verify.corpus import Corpus, make_corpus
from mellow_ds.verify.processes import run_ranks
from mellow_ds.verify.runs import NUM_STEPS, Part, run_part
from mellow_ds.verify.step_files import compare_steps
from mellow_ds.world import World

DDP = BackEnd("DDP", "fsdp", 0)


@pytest.mark.slow
def test_runs_go_on_exactly_on_the_same_world_and_nearly_on_another() -> None:
    rows = resume.compare(resume.choose(quick=True), 2, (1,), say=lambda _: None)
    assert {row.back_end.kind for row in rows} == {"deepspeed", "fsdp"}
    assert {(row.dropout, row.resumed_on) for row in rows} == {(0.0, 2), (0.5, 2), (0.0, 1)}
    assert all(row.is_well for row in rows), "\n" + resume.table(rows)


@pytest.mark.slow
def test_checkpoints_go_on_by_another_back_end_on_another_world() -> None:
    pairs = checkpoints.sample_pairs((1, 2, 3))
    rows = checkpoints.compare(pairs, say=lambda _: None)
    assert {row.source.name for row in rows} == {row.target.name for row in rows}
    assert all(row.source.kind != row.target.kind and row.source_world != row.target_world for row in rows)
    assert all(row.is_well for row in rows), "\n" + checkpoints.tables(rows)


def test_every_pair_meets_all_back_ends_and_for_each_all_worlds() -> None:
    worlds = (1, 2, 3, 4, 8)
    pairs = checkpoints.every_pair(worlds)
    names = {b.name for b in BACK_ENDS if "," not in b.name}
    assert {(source.name, target.name) for (source, _), (target, _) in pairs} == {(a, b) for a in names for b in names}
    for name in names:
        own = [(one, other) for (source, one), (_, other) in pairs if source.name == name]
        assert sorted(own) == sorted([(one, other) for one in worlds for other in worlds] * 2)
    assert len(set(pairs)) == len(pairs)


def go_on_wrongly(world: World, folder: Path, corpus: Corpus) -> dict[str, bool]:
    """Break one thing of a resumption at a time; whether the difference shows in the last checkpoint."""
    whole = run_part(world, Part(DDP, folder / "whole", NUM_STEPS, dropout=0.5), corpus)
    first = run_part(world, Part(DDP, folder / "first", 3, dropout=0.5), corpus)
    second = Part(DDP, folder / "right", NUM_STEPS, Path(first.saved), seed=99, dropout=0.5)
    found = {"nothing": compare_steps(Path(whole.saved), Path(run_part(world, second, corpus).saved)).is_none}
    load = runs.load_checkpoint

    def forget_generators(*arguments: object) -> object:
        state = load(*arguments)
        torch.manual_seed(99)
        return state

    def forget_clipping(*arguments: object) -> object:
        return {**load(*arguments), "clip": {"mean": 0.0, "num_norms": 0}}

    for name, broken in (("generators", forget_generators), ("clipping", forget_clipping)):
        runs.load_checkpoint = broken
        again = run_part(world, replace(second, folder=folder / name), corpus)
        found[name] = compare_steps(Path(whole.saved), Path(again.saved)).is_none
    return found


@pytest.mark.slow
def test_a_resumption_that_forgets_something_is_found_out(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    found = run_ranks(1, go_on_wrongly, tmp_path / "runs", corpus)[0]
    assert found == {"nothing": True, "generators": False, "clipping": False}


def take_up_wrongly(world: World, folder: Path, corpus: Corpus) -> None:
    first = run_part(world, Part(DDP, folder / "first", 3), corpus)
    load = runs.load_checkpoint

    def spoil_a_weight(start: Path, engine: object, own: World) -> object:
        state = load(start, engine, own)
        model = engine._model
        with torch.no_grad():
            model.projector.linear1.weight[0, 0] += 1e-6
        return state

    runs.load_checkpoint = spoil_a_weight
    run_part(world, Part(DDP, folder / "again", 4, Path(first.saved)), corpus)


@pytest.mark.slow
def test_a_weight_that_is_not_taken_over_bit_for_bit_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    with pytest.raises(FaultError, match=r"projector\.linear1\.weight was not taken over as .*step-000003"):
        run_ranks(1, take_up_wrongly, tmp_path / "runs", corpus)
