"""The same steps everywhere: a sample of back ends, worlds and accumulations; and that a wrong one is found out."""

import dataclasses
import math

import numpy as np
import pytest

from mellow_ds.errors import FaultError
from mellow_ds.verify.back_ends import BACK_ENDS
from mellow_ds.verify.equivalence import Case, all_cases, compare, difference, facts, sample_cases, table
from mellow_ds.verify.reference import Trajectory, arrays, plain_loss, train_plainly
from mellow_ds.verify.small import batch_of, small_model
from mellow_ds.verify.steps import NUM_STEPS, examples_of, learning_rate_of, micro_batches
from mellow_ds.world import World

WORLDS, ACCUMULATIONS = (1, 2, 4), (1, 2, 4)


def test_the_sample_meets_each_back_end_world_and_accumulation() -> None:
    sample = sample_cases(WORLDS, ACCUMULATIONS)
    assert [case.back_end for case in sample] == list(BACK_ENDS)
    for kind in ("deepspeed", "fsdp"):
        own = [case for case in sample if case.back_end.kind == kind]
        assert {case.world_size for case in own} == set(WORLDS)
        assert {case.accumulation for case in own} == set(ACCUMULATIONS)
    assert set(sample) < set(all_cases(WORLDS, ACCUMULATIONS))
    assert len(all_cases(WORLDS, ACCUMULATIONS)) == 9 * len(BACK_ENDS)


def test_the_steps_are_cut_without_a_loss_and_some_parts_are_empty() -> None:
    sizes = []
    for step in range(NUM_STEPS):
        ids = []
        for rank in range(4):
            batches = micro_batches(examples_of(step), World(rank, 4), 4, audio_tokens=2)
            sizes += [batch.num_examples for batch in batches]
            ids += [i for batch in batches for i in batch.example_ids]
        assert ids == [str(number) for number in examples_of(step)]
    assert {0, 1} <= set(sizes)
    assert len({learning_rate_of(step) for step in range(NUM_STEPS)}) > 15


def test_the_reference_has_a_loss_of_its_own_and_clips_some_steps() -> None:
    """Over the logits of all positions, where the model's own loss runs the head on answer positions only."""
    model = small_model(seed=4)
    numbers = list(range(5))
    own = model(**batch_of(numbers, model.num_audio_tokens).model_inputs()).loss
    assert float(plain_loss(model, numbers)) == pytest.approx(float(own), rel=1e-6)
    found = facts(NUM_STEPS)
    assert 0 < found["clipped_steps"] < NUM_STEPS
    assert found["largest_movement"] > 0.05


@pytest.fixture(scope="module")
def right() -> Trajectory:
    """What a back end without a flaw comes to in three steps."""
    found = train_plainly(3, seed=1)
    model = small_model(seed=1)
    fixed = {name: t for name, t in model.state_dict().items() if name.startswith("encoder.")}
    found.fixed = arrays(fixed.items())
    return found


def test_a_difference_of_any_kind_is_found_out(right: Trajectory) -> None:
    case = Case(BACK_ENDS[0], 1, 1)
    reference = train_plainly(3, seed=1)
    assert difference(case, right, reference).is_well

    def spoilt(name: str, place: int, factor: float) -> Trajectory:
        values = list(getattr(right, name))
        values[place] *= factor
        return dataclasses.replace(right, **{name: values})

    def spoilt_array(kind: str, name: str, added: float) -> Trajectory:
        tensors = dict(getattr(right, kind))
        tensors[name] = tensors[name] + np.float32(added)
        return dataclasses.replace(right, **{kind: tensors})

    frozen = next(name for name, array in right.fixed.items() if array.dtype == np.float32)
    wrong = [
        spoilt("losses", 2, 1 + 2e-5),
        spoilt("losses", 1, math.nan),
        spoilt("grad_norms", 0, 1 - 2e-5),
        spoilt_array("weights", "projector.linear1.weight", 2e-4),
        spoilt_array("weights", "projector.linear1.weight", math.nan),
        spoilt_array("fixed", frozen, 1e-6),
    ]
    for trajectory in wrong:
        found = difference(case, trajectory, reference)
        assert not found.is_well
        assert "PAST THE TOLERANCE" in table([found])
    del right.fixed[frozen]
    with pytest.raises(FaultError, match="not those of the reference by name"):
        difference(case, right, reference)


@pytest.mark.slow
@pytest.mark.timeout(240)  # the four minutes that the sample may take
def test_a_sample_of_every_back_end_takes_the_steps_of_one_big_batch() -> None:
    found = compare(sample_cases(WORLDS, ACCUMULATIONS), NUM_STEPS)
    assert len(found) == len(BACK_ENDS)
    assert all(one.is_well for one in found), "\n" + table(found)
