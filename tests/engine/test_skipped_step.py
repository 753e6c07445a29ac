"""A loss or gradient that is not finite: the step is skipped on all ranks, and who did it is named."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mellow_ds.data.batch import Batch
from mellow_ds.engine.loss import StepTotals, loss_for_backward
from mellow_ds.engine.step import StepEngine
from mellow_ds.model.blocks import recompute_activations
from mellow_ds.verify.small import TRAIN, small_model
from mellow_ds.world import World
from tests.engine.cases import EXAMPLES, allow_float16, make_engine, micro_batches, reference, train
from tests.ranks import run_ranks


def take(engine: StepEngine, batches: list[Batch]) -> Any:
    return engine.train_step(batches, TRAIN.learning_rate, TRAIN.max_grad_norm)


def spoilt(batches: list[Batch]) -> list[Batch]:
    """The last micro-batch with a clip of NaN."""
    values = vars(batches[-1]) | {"waveforms": batches[-1].waveforms * math.nan}
    return [*batches[:-1], Batch(**values)]


def check_bad_clip(world: World, kind: str, stages: list[int]) -> None:
    losses, norms, _ = reference(3)
    for stage in stages:
        model = small_model(seed=1)
        tokens = model.num_audio_tokens
        engine = make_engine(kind, model, stage, world)
        first = train(engine, tokens, world, 2, EXAMPLES[:1])
        before = {state.name: state for state in engine.parameter_states()}
        batches = micro_batches(EXAMPLES[2], world, 2, tokens)
        result = take(engine, spoilt(batches) if world.rank == 1 else batches)
        assert result.skipped
        assert math.isnan(result.loss)
        assert "rank 1, micro-batch 1 (examples 19, 20): encoder" in result.fault
        assert "gives values that are not finite, the first to do so" in result.fault
        for state in engine.parameter_states():
            assert torch.equal(state.weight, before[state.name].weight)
            assert state.num_updates == 1
            assert all(torch.equal(m, before[state.name].moments[key]) for key, m in state.moments.items())
        rest = train(engine, tokens, world, 2, EXAMPLES[1:3])  # as if nothing had been
        torch.testing.assert_close([*first[0], *rest[0]], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close([*first[1], *rest[1]], norms, rtol=1e-5, atol=0)
        engine.close()


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_a_clip_that_is_not_finite_skips_the_step_everywhere_and_leaves_no_trace(kind: str) -> None:
    run_ranks(2, check_bad_clip, kind, [0, 1, 2, 3])


class BadGradient(torch.autograd.Function):
    """Passes values on and spoils the gradient."""

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


def spoil_gradient(module: torch.nn.Module) -> None:
    forward: Callable[..., Any] = module.forward
    module.forward = lambda *args, **kwargs: BadGradient.apply(forward(*args, **kwargs))


def check_bad_gradient(world: World, kind: str, stages: list[int], precision: str) -> None:
    if precision == "float16":
        allow_float16()
    for stage in stages:
        model = small_model(seed=1)
        tokens = model.num_audio_tokens
        if world.rank == 0:
            spoil_gradient(model.decoder.model.layers[1].mlp)
        engine = make_engine(kind, model, stage, world, precision=precision)
        if precision == "float16":
            engine.load_scaler_state({**engine.scaler_state(), "cur_scale": 4.0, "cur_hysteresis": 1.0})
        for _ in range(5):  # float16: past the floor of its loss scale
            result = take(engine, micro_batches(EXAMPLES[0], world, 2, tokens))
            assert result.skipped
            assert math.isfinite(result.loss)
            assert result.fault.startswith("rank 0, micro-batch 0 (examples 0")
            assert "the gradient at the output of decoder.model.layers." in result.fault
        engine.close()


@pytest.mark.parametrize(
    ("kind", "precision", "stages"),
    [
        ("deepspeed", "float32", [0, 1, 2, 3]),
        ("fsdp", "float32", [0, 1, 2, 3]),
        ("deepspeed", "float16", [1, 2, 3]),
        ("fsdp", "float16", [0, 1, 2, 3]),
    ],
)
def test_a_gradient_that_is_not_finite_is_traced_to_its_module(kind: str, precision: str, stages: list[int]) -> None:
    run_ranks(2, check_bad_gradient, kind, stages, precision)


def check_memory(world: World) -> None:
    model = small_model(seed=1)
    spoil_gradient(model.decoder.model.layers[0].mlp)
    assert recompute_activations(model.decoder) == 2
    engine = make_engine("fsdp", model, 0, world)
    inside: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    for layer in model.decoder.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, __, output: inside.append(weakref.ref(output)))
    model.decoder.lm_head.register_forward_pre_hook(
        lambda *_: alive.append(sum(found() is not None for found in inside))
    )
    fault = take(engine, micro_batches(EXAMPLES[0], world, 2, model.num_audio_tokens)).fault
    assert "the gradient at the output of decoder.model.layers.0" in fault
    assert len(alive) == 4  # two micro-batches, and once more to look at them
    assert alive == [0] * 4


def test_a_second_look_takes_no_more_memory_than_the_step() -> None:
    """With activations that are computed again, next to none of a block's are kept."""
    run_ranks(1, check_memory)


def check_overflow(world: World, kind: str, stage: int) -> None:
    allow_float16()
    model = small_model(seed=1)
    engine = make_engine(kind, model, stage, world, 1, precision="float16")
    engine.load_scaler_state({**engine.scaler_state(), "cur_scale": 2.0**40, "cur_hysteresis": 1.0})
    result = take(engine, micro_batches(EXAMPLES[0], world, 1, model.num_audio_tokens))
    assert (result.skipped, result.fault) == (True, "")
    assert engine.scaler_state()["cur_scale"] == 2.0**39
    engine.close()


@pytest.mark.parametrize(("kind", "stage"), [("deepspeed", 2), ("fsdp", 3)])
def test_an_overflow_by_the_loss_scale_alone_is_no_fault(kind: str, stage: int) -> None:
    run_ranks(2, check_overflow, kind, stage)


def test_an_infinite_loss_spoils_every_gradient() -> None:
    """Cross entropy of a target whose logit is -inf is infinite, and its gradient is finite."""
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1]), reduction="sum")
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.isfinite(plain).all()
    (gradient,) = torch.autograd.grad(loss_for_backward(loss, StepTotals(1, 1), 2), logits)
    assert torch.isnan(gradient).all()


def check_statistics(world: World) -> None:
    model = small_model(seed=1)
    model.set_trainable(("encoder", "projector", "decoder"))
    tokens = model.num_audio_tokens
    engine = make_engine("fsdp", model.train(), 0, world, 1)
    before = dict(engine.fixed_states())
    result = take(engine, spoilt(micro_batches(EXAMPLES[0], world, 1, tokens)))
    assert result.skipped
    after = dict(engine.fixed_states())
    assert any("running_mean" in name for name in after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    take(engine, micro_batches(EXAMPLES[0], world, 1, tokens))
    moved = dict(engine.fixed_states())
    assert any(not torch.equal(value, moved[name]) for name, value in before.items())


def test_batchnorm_statistics_are_put_back() -> None:
    run_ranks(2, check_statistics)
