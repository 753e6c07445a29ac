"""Which parameters get weight decay, and the norm of all gradients."""

import torch
from torch import nn

from mellow_ds.config.schema import TrainConfig
from mellow_ds.engine.optimizer import gradient_norm, parameter_groups, torch_optimizer
from tests.engine.small import small_model


def test_biases_norms_and_embeddings_are_not_decayed() -> None:
    model = small_model(seed=0)
    decayed, plain = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
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


def test_a_model_of_biases_only_has_one_group() -> None:
    assert len(parameter_groups(nn.LayerNorm(3), 0.1)) == 1


def test_both_optimizers_are_fused_and_named() -> None:
    for kind, cls in (("AdamW", torch.optim.AdamW), ("Adam", torch.optim.Adam)):
        model = nn.Linear(2, 2)
        optimizer, name = torch_optimizer(parameter_groups(model, 0.1), TrainConfig(optimizer_type=kind))  # type: ignore[arg-type]
        assert type(optimizer) is cls
        assert name == f"torch fused {kind}"
        assert all(group["fused"] for group in optimizer.param_groups)


def test_gradient_norm_is_over_all_and_infinite_where_one_is() -> None:
    a, b, unused = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert gradient_norm([a, b, unused]) == 5.0
    b.grad = torch.tensor([float("nan")])
    assert gradient_norm([a, b]) == float("inf")
    assert gradient_norm([unused]) == 0.0
