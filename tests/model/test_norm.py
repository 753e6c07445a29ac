"""Batch normalisation against torch's own, and under half precision."""

import torch
from torch import nn

from mellow_ds.model.norm import BatchNorm2d


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
