"""What changes how a model runs, on both back ends, against plain PyTorch on one process with one big batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mellow_ds.model.blocks import compile_blocks, recompute_activations
from mellow_ds.model.lora import draw_adapters
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.norm import synchronise_batchnorm
from mellow_ds.verify.small import TRAIN, batch_of, small_model
from mellow_ds.world import World
from tests.engine.cases import EXAMPLES, make_engine, train
from tests.ranks import run_ranks

CASES = [("deepspeed", 1), ("deepspeed", 3), ("fsdp", 0), ("fsdp", 1), ("fsdp", 3)]


def recomputing() -> MellowForConditionalGeneration:
    model = small_model(seed=1)
    recompute_activations(model)
    return model


def compiled() -> MellowForConditionalGeneration:
    model = small_model(seed=1)
    recompute_activations(model)
    assert compile_blocks(model.decoder) == 2
    return model


def with_adapters() -> MellowForConditionalGeneration:
    config = small_model(seed=1).config
    config.lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["all-linear"]}
    torch.manual_seed(1)
    model = MellowForConditionalGeneration(config)
    draw_adapters(model.decoder, 3)
    model.set_trainable(("projector", "decoder"))
    return model.train()


def training_its_encoder() -> MellowForConditionalGeneration:
    model = small_model(seed=1)
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_trainable(("encoder", "projector", "decoder"))
    return model.train()


def all_together() -> MellowForConditionalGeneration:
    model = training_its_encoder()
    recompute_activations(model)
    return model


def plainly(make: Callable[[], Any]) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, weights and buffers after the steps in plain PyTorch."""
    model = make()
    parameters = dict(model.named_parameters())
    norms = {f"{name}.{own}" for name, module in model.named_modules() if "Norm" in type(module).__name__
             for own in ("weight", "bias")}  # fmt: skip
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and "embed" not in name and name not in norms]
    kept = {id(p) for p in decayed}
    plain = [p for p in parameters.values() if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": TRAIN.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=TRAIN.learning_rate)
    losses = []
    for numbers in EXAMPLES[:3]:
        loss = model(**batch_of(numbers, model.num_audio_tokens).model_inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.grad is not None], TRAIN.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach().clone() for n, p in parameters.items()}, dict(model.named_buffers())


def check(world: World, make: Callable[[], Any], accumulation: int) -> None:
    plain = {
        recomputing: lambda: small_model(seed=1),
        compiled: lambda: small_model(seed=1),
        all_together: training_its_encoder,
    }.get(make, make)
    losses, weights, buffers = plainly(plain)
    # a compiler takes half a minute a case
    for kind, stage in [case for case in CASES if make is not compiled or case[1] == 3]:
        model = make()
        synchronise_batchnorm(model, dist.group.WORLD)
        tokens = model.num_audio_tokens
        engine = make_engine(kind, model, stage, world, accumulation)
        found, _ = train(engine, tokens, world, accumulation, EXAMPLES[:3])
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=0)
        states = list(engine.parameter_states())
        for state in states:
            torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-4)
        assert {state.name for state in states} == {n for n, p in make().named_parameters() if p.requires_grad}
        for name, value in engine.fixed_states():
            if "running" in name:
                torch.testing.assert_close(value, buffers[name], rtol=1e-4, atol=1e-5)
        engine.close()
    if make is compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # and not run as it is after a warning


@pytest.mark.slow
def test_compiled_blocks_change_nothing() -> None:
    """With activations that are computed again, as the two are used together."""
    run_ranks(2, check, compiled, 2, seconds=300)


def test_recomputed_activations_change_nothing() -> None:
    run_ranks(2, check, recomputing, 2)


def test_adapters_on_a_frozen_decoder() -> None:
    run_ranks(2, check, with_adapters, 2)


def test_batchnorm_over_all_ranks_of_an_encoder_that_is_trained() -> None:
    """One micro-batch a step: with several, each is normalised by itself."""
    run_ranks(2, check, training_its_encoder, 1)


def test_recomputed_activations_of_an_encoder_that_is_trained() -> None:
    run_ranks(2, check, all_together, 1)
