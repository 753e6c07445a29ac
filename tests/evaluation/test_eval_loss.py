"""The loss on an evaluation set against one pass over all of it, for any cut into ranks and batches."""

from collections.abc import Iterator

import pytest
import torch

from mellow_ds.data.batch import Batch
from mellow_ds.evaluation.eval_loss import measure_loss
from mellow_ds.verify.small import batch_of, small_model
from mellow_ds.world import World
from tests.ranks import run_ranks

EXAMPLES = list(range(11))  # one or two clips, answers of 1 to 5 tokens


class Batches:
    """These batches, and whether they were closed."""

    def __init__(self, numbers: list[list[int]], audio_tokens: int) -> None:
        self.batches = [batch_of(part, audio_tokens) for part in numbers]
        self.closed = False

    def __iter__(self) -> Iterator[tuple[Batch, list[object]]]:
        return iter([(batch, []) for batch in self.batches])

    def close(self) -> None:
        self.closed = True


def expected_loss() -> tuple[float, int]:
    model = small_model(seed=2).eval()
    batch = batch_of(EXAMPLES, model.num_audio_tokens)
    return model(**batch.model_inputs()).loss.item(), batch.num_answer_tokens


@pytest.mark.parametrize("cut", [[EXAMPLES], [[e] for e in EXAMPLES], [EXAMPLES[:4], EXAMPLES[4:], []]])
def test_it_is_the_mean_over_all_answer_tokens(cut: list[list[int]]) -> None:
    loss, num_answer_tokens = expected_loss()
    model = small_model(seed=2)
    batches = Batches(cut, model.num_audio_tokens)
    before = torch.get_rng_state()
    measured = measure_loss(model, batches, World(), "cpu")
    assert measured.loss == pytest.approx(loss, rel=1e-6)
    assert (measured.num_answer_tokens, measured.num_examples) == (num_answer_tokens, len(EXAMPLES))
    assert model.training  # as it was
    assert not model.encoder.training
    assert batches.closed
    assert torch.equal(torch.get_rng_state(), before)  # the run goes on as if nothing had been measured
    assert all(parameter.grad is None for parameter in model.parameters())


def check_two_ranks(world: World) -> None:
    loss, _ = expected_loss()
    model = small_model(seed=2)
    own = [EXAMPLES[:5], EXAMPLES[5:9]] if world.is_main else [EXAMPLES[9:], []]
    measured = measure_loss(model, Batches(own, model.num_audio_tokens), world, "cpu")
    assert measured.loss == pytest.approx(loss, rel=1e-6)
    assert measured.num_examples == len(EXAMPLES)


def test_two_ranks_measure_the_same() -> None:
    run_ranks(2, check_two_ranks)
