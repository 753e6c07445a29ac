"""Batch normalisation against torch's own: under half precision, over several ranks, and run again."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from mellow_ds.model.blocks import recompute_activations
from mellow_ds.model.norm import (
    BatchNorm1d,
    BatchNorm2d,
    paused,
    statistics_kept_for_recomputation,
    synchronise_batchnorm,
)
from mellow_ds.verify.small import batch_of, small_model
from mellow_ds.world import World
from tests.ranks import run_ranks


def pair() -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Ours and torch's with the same numbers."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    state = {"weight": torch.randn(3), "bias": torch.randn(3), "running_mean": torch.randn(3) * 20}
    state |= {"running_var": torch.rand(3) * 300, "num_batches_tracked": torch.tensor(4)}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    return ours, theirs


def test_it_is_torchs_in_float32() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.train()(x), theirs.train()(x))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_statistics_keep_their_precision_when_the_model_is_cast() -> None:
    ours, theirs = pair()
    ours.bfloat16()
    assert ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.running_mean, theirs.running_mean)
    x = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    y = ours.train()(x)
    assert y.dtype == torch.bfloat16
    assert ours.running_mean is not None
    assert ours.running_mean.dtype == torch.float32
    theirs.train()(x.float())
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_a_paused_layer_takes_and_gives_what_it_has() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 3, 4, 5)
    with paused(nn.Sequential(ours)):
        y = ours.train()(x)
    assert torch.equal(y, theirs.eval()(x))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert torch.equal(ours(x), theirs.train()(x))  # and goes on as before


def test_statistics_are_float32_whatever_the_default_is() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = BatchNorm2d(3)
    finally:
        torch.set_default_dtype(before)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_var is not None
    assert layer.running_var.dtype == torch.float32


class Net(nn.Module):
    """Two layers, the second normalised in 1d; ours or torch's, with the same weights."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 3, 3)
        self.first = BatchNorm2d(3) if own else nn.BatchNorm2d(3)
        self.second = BatchNorm1d(4) if own else nn.BatchNorm1d(4)
        self.mix = nn.Linear(3, 4)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.normal_()
                layer.bias.normal_()
                layer.running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[C, 2, 6, 5] -> [C, 4, 12]."""
        y = self.mix(torch.relu(self.first(self.conv(x))).flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.second(y)


def clips_of(rank: int) -> torch.Tensor:
    """Unequal numbers of clips, about a mean far from zero."""
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(1 + 2 * rank, 2, 6, 5, generator=draw) * (rank + 1) - 40


def outcome(net: Net, x: torch.Tensor, again: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, gradient of x) of the sum of squares; `again`: with the forward pass run again in the backward one."""
    x = x.clone().requires_grad_()
    context = {"use_reentrant": False, "context_fn": statistics_kept_for_recomputation}
    y = checkpoint(net, x, **context) if again else net(x)
    (y * torch.linspace(-1, 1, 12) + y**2).sum().backward()
    return y.detach(), x.grad


def one_of_many(rank: int, group: dist.ProcessGroup, again: bool, idle: int) -> None:
    """Against one process with the clips of all ranks but the `idle` one, whose batch counts nothing."""
    net, whole = Net(own=True), Net(own=False)
    assert synchronise_batchnorm(net, group) == 2
    busy = [other for other in range(dist.get_world_size(group)) if other != idle]
    for _ in range(2):  # running statistics move twice
        net.zero_grad()
        whole.zero_grad()
        x = torch.cat([clips_of(other) for other in busy])
        expected, of_x = outcome(whole, x)
        if rank == idle:
            with paused(net):
                silence = torch.zeros(1, 2, 6, 5, requires_grad=True)
                y = checkpoint(net, silence, use_reentrant=False, context_fn=statistics_kept_for_recomputation)
            (y * 0).sum().backward()  # runs forward again, after the pause
            assert silence.grad is not None
            assert torch.equal(silence.grad, torch.zeros_like(silence))
            assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())
        else:
            y, own_of_x = outcome(net, clips_of(rank), again)
            sizes = [len(clips_of(other)) for other in busy]
            place = busy.index(rank)
            torch.testing.assert_close(y, expected.split(sizes)[place], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own_of_x, of_x.split(sizes)[place], rtol=1e-4, atol=1e-4)
        for (name, own), theirs in zip(net.named_parameters(), whole.parameters(), strict=True):
            dist.all_reduce(own.grad, group=group)
            scale = float(theirs.grad.abs().max())
            # the bias before a batch norm has no gradient but rounding
            torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-5, atol=max(1e-5 * scale, 5e-4), msg=name)
        for name, statistic in net.named_buffers():
            torch.testing.assert_close(statistic, whole.state_dict()[name], rtol=1e-5, atol=1e-5, msg=name)
            of_first = statistic.clone()
            dist.broadcast(of_first, src=0, group=group)
            assert torch.equal(of_first, statistic)  # bit for bit on all ranks


def nothing_anywhere(world: World) -> None:
    """No rank has a clip that counts: the running statistics stand in, and stay."""
    net, whole = Net(own=True), Net(own=False).eval()
    synchronise_batchnorm(net, dist.group.WORLD)
    with paused(net):
        y, _ = outcome(net, clips_of(world.rank))
    torch.testing.assert_close(y, whole(clips_of(world.rank)), rtol=1e-5, atol=1e-5)
    for name, statistic in net.named_buffers():
        assert torch.equal(statistic, whole.state_dict()[name])


def whole_model(world: World, again: bool) -> None:
    """Two clips or three on two ranks, none on the third: a sum of losses, its gradients, and statistics."""
    models = [small_model(1), small_model(1)]
    for model in models:
        model.set_trainable(("encoder", "projector", "decoder"))
        model.encoder.net.dropout.p = 0.0
    own, whole = models
    synchronise_batchnorm(own, dist.group.WORLD)
    if again:
        recompute_activations(own)
    of_ranks = [[0, 1], [2], []]
    for _ in range(2):
        output = own(**batch_of(of_ranks[world.rank], own.num_audio_tokens).model_inputs())
        output.loss_sum.backward()
        expected = whole(**batch_of([0, 1, 2], own.num_audio_tokens).model_inputs())
        expected.loss_sum.backward()
    loss = output.loss_sum.detach().clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, expected.loss_sum.detach(), rtol=1e-5, atol=1e-5)
    for (name, parameter), theirs in zip(own.named_parameters(), whole.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, theirs.grad, rtol=1e-4, atol=2e-5, msg=name)
    for name, statistic in own.named_buffers():
        torch.testing.assert_close(statistic, whole.get_buffer(name), rtol=1e-5, atol=1e-5, msg=name)


def all_cases(world: World) -> None:
    """Three ranks, and the first two of them; one start of processes for all."""
    pair_of_ranks = dist.new_group([0, 1])
    for group, size in ((dist.group.WORLD, 3), (pair_of_ranks, 2)):
        for again in (False, True):
            for idle in (-1, size - 1, 0):
                if world.rank < size:
                    one_of_many(world.rank, group, again, idle)
    nothing_anywhere(world)
    for again in (False, True):
        whole_model(world, again)


def test_ranks_together_normalise_as_one_process_with_all_their_clips() -> None:
    run_ranks(3, all_cases, seconds=120)


@pytest.mark.parametrize("own", [True, False])
def test_running_a_layer_again_moves_its_statistics_once(own: bool) -> None:
    once, twice = Net(own), Net(own)
    x = clips_of(2)
    y, of_x = outcome(once, x)
    again, of_x_again = outcome(twice, x, again=True)
    assert torch.equal(y, again)
    assert torch.equal(of_x, of_x_again)
    same = all(torch.equal(a, b) for a, b in zip(once.buffers(), twice.buffers(), strict=True))
    assert same == own  # torch's own layer moves them twice, which is why this is here


def test_what_counted_nothing_counts_nothing_when_it_is_run_again() -> None:
    net, untouched = Net(own=True), Net(own=True)
    with paused(net):
        y = checkpoint(net, clips_of(1), use_reentrant=False, context_fn=statistics_kept_for_recomputation)
    expected = untouched.eval()(clips_of(1))
    torch.testing.assert_close(y, expected)
    y.sum().backward()  # after the pause
    expected.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), untouched.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), untouched.buffers(), strict=True))


def test_switched_off_again_each_rank_is_by_itself() -> None:
    net = Net(own=True)
    assert synchronise_batchnorm(net, None) == 2
    y, _ = outcome(net, clips_of(1))
    torch.testing.assert_close(y, outcome(Net(own=False), clips_of(1))[0])
