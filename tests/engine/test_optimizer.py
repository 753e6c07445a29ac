"""Which parameters get weight decay, and the norm of all gradients."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from mellow_ds.config.train_keys import PartRates, TrainConfig
from mellow_ds.engine.optimizer import gradient_norm, parameter_groups, torch_optimizer
from mellow_ds.verify.small import small_model


def test_biases_norms_and_embeddings_are_not_decayed() -> None:
    model = small_model(seed=0)
    groups = parameter_groups(model, TrainConfig(weight_decay=0.3))
    assert {(group["part"], group["weight_decay"]) for group in groups} == {
        (part, decay) for part in ("projector", "decoder") for decay in (0.3, 0.0)
    }
    decayed = {"params": [p for group in groups if group["weight_decay"] for p in group["params"]]}
    plain = {"params": [p for group in groups if not group["weight_decay"] for p in group["params"]]}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    assert "decoder.model.layers.0.self_attn.q_proj.weight" in decayed_names
    assert "projector.linear1.weight" in decayed_names
    assert "decoder.model.embed_tokens.weight" in plain_names  # tied with the head: counts once
    assert "projector.layer_norm.weight" in plain_names
    assert "decoder.model.norm.weight" in plain_names
    assert not any(name.startswith("encoder.") for name in decayed_names | plain_names)  # frozen
    assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_tables_of_biases_and_positions_are_no_matrices(kind: Any) -> None:
    """Those of HTSAT's windows have two dimensions, those of AST three."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
            self.position_embeddings = nn.Parameter(torch.zeros(1, 4, 2))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
            self.weight = nn.Parameter(torch.zeros(2, 2))

    block = Block()
    groups = parameter_groups(nn.ModuleDict({"encoder": block}), TrainConfig(weight_decay=0.3, optimizer_type=kind))
    found = {id(p): (group["weight_decay"], group["use_muon"]) for group in groups for p in group["params"]}
    assert found.pop(id(block.weight)) == (0.3, kind == "Muon")
    assert set(found.values()) == {(0.0, False)}


def test_a_model_of_biases_only_has_one_group() -> None:
    assert len(parameter_groups(nn.Sequential(nn.LayerNorm(3)), TrainConfig())) == 1


def test_both_optimizers_are_fused_and_named() -> None:
    for kind, cls in (("AdamW", torch.optim.AdamW), ("Adam", torch.optim.Adam)):
        model, config = nn.Linear(2, 2), TrainConfig(optimizer_type=kind)  # type: ignore[arg-type]
        optimizer, name = torch_optimizer(parameter_groups(model, config), config)
        assert type(optimizer) is cls
        assert name == f"torch fused {kind}"
        assert all(group["fused"] for group in optimizer.param_groups)


def test_gradient_norm_is_over_all_and_infinite_where_one_is() -> None:
    a, b = torch.tensor([3.0]), torch.tensor([4.0])
    assert gradient_norm([a, b]) == 5.0
    assert gradient_norm([a, b * float("nan")]) == float("inf")
    assert gradient_norm([]) == 0.0


def test_gradient_norm_of_many_numbers_is_exact() -> None:
    """As large as an embedding, with a few large numbers first, as its gradient has them."""
    gradient = torch.full((4_000_000,), 1e-3)
    gradient[:1000] = 10.0
    exact = math.sqrt(1000 * 10.0**2 + 3_999_000 * float(gradient[-1]) ** 2)
    assert gradient_norm([gradient, gradient]) == pytest.approx(math.sqrt(2) * exact, rel=1e-7)


def test_parts_have_rates_of_their_own_and_muon_takes_the_matrices() -> None:
    config = TrainConfig(
        learning_rate=1e-3, learning_rates=PartRates(decoder=1e-4), optimizer_type="Muon", muon_learning_rate=0.02
    )
    groups = parameter_groups(small_model(seed=0), config)
    rates = {(group["part"], group["use_muon"]): group["rate"] for group in groups}
    assert rates == {
        ("projector", True): pytest.approx(20.0),
        ("projector", False): 1.0,
        ("decoder", True): pytest.approx(2.0),
        ("decoder", False): pytest.approx(0.1),
    }


def test_lamb_becomes_adamw_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model, config = nn.Linear(2, 2), TrainConfig(optimizer_type="Lamb")
    with caplog.at_level(logging.WARNING, logger="mellow_ds.engine"):
        _, name = torch_optimizer(parameter_groups(model, config), config)
    assert name == "torch fused AdamW"
    assert "no FusedLamb can be had here; torch fused AdamW takes its place" in caplog.text
