"""Losses by kind of example, over micro-batches and ranks, against sums made by hand."""

import torch

from mellow_ds.data.batch import Batch
from mellow_ds.engine.loss import LossSums, StepTotals
from mellow_ds.verify.small import batch_of, small_model
from mellow_ds.world import World
from tests.ranks import run_ranks

KINDS = {0: [0, 2], 1: [2, 2, 1]}  # of the rows of each rank's batch


def with_kinds(numbers: list[int], kinds: list[int], audio_tokens: int) -> Batch:
    batch = batch_of(numbers, audio_tokens)
    values = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return Batch(**{**values, "kinds": torch.tensor(kinds)})


def check_on_two_ranks(world: World) -> None:
    model = small_model(3).eval()
    tokens = model.num_audio_tokens
    batches = {0: with_kinds([1, 2], KINDS[0], tokens), 1: with_kinds([3, 4, 5], KINDS[1], tokens)}
    wanted = {kind: [0.0, 0.0] for kind in range(4)}
    for rank, batch in batches.items():
        for row, kind in enumerate(KINDS[rank]):
            # one example at a time, without padding
            alone = model(**batch_of([[1, 2], [3, 4, 5]][rank][row : row + 1], tokens).model_inputs())
            wanted[kind][0] += alone.loss_sum.item()
            wanted[kind][1] += alone.num_answer_tokens.item()
            assert batch.num_answer_tokens
    with torch.no_grad():
        output = model(**batches[world.rank].model_inputs())
    sums = LossSums(4, torch.device("cpu"))
    sums.add(batches[world.rank], output.loss_sum, output.row_losses)
    sums.add(batch_of([], tokens), torch.zeros(()), torch.zeros(1))  # a batch without examples counts nothing
    num_tokens = sum(batch.num_answer_tokens for batch in batches.values())
    loss, kinds = sums.over_all_ranks(StepTotals(num_tokens, 5))
    torch.testing.assert_close(torch.tensor(kinds), torch.tensor(list(wanted.values())), rtol=1e-4, atol=1e-4)
    assert abs(loss - sum(total for total, _ in kinds) / num_tokens) < 1e-5
    assert kinds[3] == (0.0, 0.0)


def test_losses_by_kind_over_two_ranks() -> None:
    run_ranks(2, check_on_two_ranks)
