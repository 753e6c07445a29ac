"""Learning rates by part, and parts that are freed later: each goes on from its own optimizer state."""

import logging

import pytest
import torch

from mellow_ds.config.train_keys import PartRates
from mellow_ds.engine.build import build_engine
from mellow_ds.engine.protocol import ParameterState
from mellow_ds.errors import CheckpointError, ConfigError
from mellow_ds.verify.small import TRAIN, batch_of, small_model
from mellow_ds.world import World
from tests.engine.cases import EXAMPLES, make_engine, shape, train, with_train
from tests.ranks import run_ranks

PHASES = [("projector",), ("projector", "decoder")]
RATES = PartRates(projector=3e-3)


def phases_in_plain_pytorch() -> dict[str, torch.Tensor]:
    """Two steps with the projector alone, two with the decoder too; torch keeps a state for each parameter."""
    model = small_model(seed=1)
    groups = []
    for part, rate in (("projector", 3e-3), ("decoder", TRAIN.learning_rate)):
        named = [(name, p) for name, p in model.named_parameters() if name.startswith(part)]
        decays = [p for name, p in named if p.ndim > 1 and "embed" not in name]
        others = [p for name, p in named if p.ndim < 2 or "embed" in name]
        groups += [{"params": decays, "lr": rate, "weight_decay": TRAIN.weight_decay}]
        groups += [{"params": others, "lr": rate, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    for step, numbers in enumerate(EXAMPLES):
        model.set_trainable(PHASES[step // 2])
        loss = model(**batch_of(numbers, model.num_audio_tokens).model_inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], TRAIN.max_grad_norm)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check_phases(world: World, cases: list[tuple[str, int]]) -> None:
    wanted = phases_in_plain_pytorch()
    for kind, stage in cases:
        weights: dict[str, torch.Tensor] = small_model(seed=1).state_dict()
        states: list[ParameterState] = []
        for number, parts in enumerate(PHASES):
            model = small_model(seed=1)
            model.load_state_dict(weights)
            model.set_trainable(parts)
            tokens = model.num_audio_tokens
            engine = make_engine(kind, model, stage, world, 2, with_train(learning_rates=RATES))
            engine.load_parameter_states(iter(states))
            train(engine, tokens, world, 2, EXAMPLES[2 * number : 2 * number + 2])
            states = list(engine.parameter_states())
            weights = {**weights, **{state.name: state.weight for state in states}}
            weights["decoder.lm_head.weight"] = weights["decoder.model.embed_tokens.weight"]  # tied
            engine.close()
        for name, weight in wanted.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)
        assert {s.num_updates for s in states if s.name.startswith("projector")} == {4}
        assert {s.num_updates for s in states if s.name.startswith("decoder")} == {2}


def test_a_part_that_is_freed_later_starts_from_nothing_and_the_others_go_on() -> None:
    """Bias correction depends on how often a parameter was updated, and DeepSpeed counts once a group."""
    run_ranks(2, check_phases, [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)])
    run_ranks(2, check_phases, [("fsdp", 0), ("fsdp", 2), ("fsdp", 3)])


def check_muon(world: World) -> None:
    """The same weights sharded and whole, but for bfloat16 in Newton-Schulz; and all matrices, no others, use it."""
    found = {}
    config = with_train(optimizer_type="Muon")
    for stage in (0, 3):
        model = small_model(seed=1)
        tokens = model.num_audio_tokens
        engine = make_engine("fsdp", model, stage, world, 1, config)
        train(engine, tokens, world, 1, EXAMPLES)
        states = list(engine.parameter_states())
        found[stage] = {state.name: state.weight for state in states}
        muon = {state.name for state in states if set(state.moments) == {"momentum_buffer"}}
        assert muon == {s.name for s in states if s.weight.ndim == 2 and "embed_tokens" not in s.name}
        assert "Muon" in engine.name
        engine.close()
    for name, weight in found[0].items():
        torch.testing.assert_close(found[3][name], weight, rtol=0, atol=3e-2)  # of some 0.08 that they moved


def test_muon_on_whole_and_sharded_matrices() -> None:
    run_ranks(2, check_muon)


def check_other_optimizer(world: World) -> None:
    engine = make_engine("fsdp", small_model(seed=1), 0, world, 1, with_train(optimizer_type="Muon"))
    train(engine, small_model(1).num_audio_tokens, world, 1, EXAMPLES[:1])
    states = list(engine.parameter_states())
    for kind in ("deepspeed", "fsdp"):
        with pytest.raises(CheckpointError, match=r"has momentum_buffer of .*: go on with the train.optim"):
            make_engine(kind, small_model(seed=1), 2, world, 1).load_parameter_states(iter(states))


def test_the_state_of_another_optimizer_is_refused() -> None:
    run_ranks(1, check_other_optimizer)


def one_step_of_muon() -> tuple[torch.Tensor, torch.Tensor]:
    """(change of a matrix by the engine's optimizer, its orthogonal factor by SVD)."""
    from mellow_ds.engine.optimizer import parameter_groups, torch_optimizers

    model = small_model(seed=1)
    config = with_train(optimizer_type="Muon", weight_decay=0.0)
    optimizer, _ = torch_optimizers(parameter_groups(model, config), config)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * group["rate"]
    model(**batch_of([1, 2, 3], model.num_audio_tokens).model_inputs()).loss.backward()
    matrix = model.get_parameter("decoder.model.layers.0.self_attn.q_proj.weight")
    before = matrix.detach().clone()
    optimizer.step()
    u, _, vt = torch.linalg.svd(matrix.grad)
    return before - matrix.detach(), u @ vt


def test_muon_takes_steps_of_its_own_size() -> None:
    """Newton-Schulz brings singular values near 1, so the step has about muon_learning_rate in every direction."""
    change, orthogonal = one_step_of_muon()
    sizes = torch.linalg.svdvals(change) / 0.02
    assert sizes.max() < 1.3
    assert sizes.median() > 0.6
    cosine = (change * orthogonal).sum() / change.norm() / orthogonal.norm()
    assert cosine > 0.8  # five iterations in bfloat16 leave singular values of 0.7 to 1.2


def check_choice(world: World) -> None:
    model = small_model(seed=1)
    muon = with_train(optimizer_type="Muon")
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="Muon is not there with engine deepspeed: take engine fsdp"):
        build_engine("deepspeed", model, {"zero_optimization": {"stage": 2}}, shape(world, 1), muon, cpu)
    engine = build_engine("auto", model, {"zero_optimization": {"stage": 2}}, shape(world, 1), muon, cpu)
    assert engine.name.startswith("FSDP2 stage 2 (torch Muon")
    half = shape(world, 1, "float16")
    with pytest.raises(ConfigError, match=r"float16 at ZeRO stage 0.*take stage 1 or 2"):
        build_engine("deepspeed", small_model(1), {}, half, TRAIN, cpu)
    assert build_engine("auto", small_model(1), {}, half, TRAIN, cpu).name.startswith("DDP (")
    lamb = with_train(optimizer_type="Lamb")
    with pytest.raises(ConfigError, match="Lamb needs whole layers, and ZeRO-2 flattens and cuts them: take stage 0"):
        build_engine("deepspeed", small_model(1), {"zero_optimization": {"stage": 2}}, shape(world, 1), lamb, cpu)
    nvme = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    with pytest.raises(ConfigError, match="only DeepSpeed does"):
        build_engine("fsdp", small_model(1), nvme, shape(world, 1), TRAIN, cpu)


def test_what_a_back_end_has_not_is_refused_or_said() -> None:
    run_ranks(1, check_choice)


def check_fallback(world: World) -> None:
    import sys

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mellow_ds.engine").addHandler(handler)
    if world.rank == 1:
        sys.modules["mellow_ds.engine.deepspeed_engine"] = None  # type: ignore[assignment]  # as if it did not import
    arguments = ({"zero_optimization": {"stage": 2}}, shape(world, 1), TRAIN, torch.device("cpu"))
    engine = build_engine("auto", small_model(seed=1), *arguments)
    assert engine.name.startswith("FSDP2 stage 2")
    assert sum("FSDP2 takes its place" in line for line in lines) == world.rank  # one says it, which knows why
    if world.rank == 1:
        assert "DeepSpeed cannot be imported" in lines[0]
        with pytest.raises(ConfigError, match="engine deepspeed: DeepSpeed cannot be imported"):
            build_engine("deepspeed", small_model(seed=1), *arguments)
    else:
        with pytest.raises(ConfigError, match="DeepSpeed cannot be used on another rank"):
            build_engine("deepspeed", small_model(seed=1), *arguments)
    engine.close()
    lines.clear()
    sys.modules.pop("mellow_ds.engine.deepspeed_engine", None)
    from mellow_ds.engine.deepspeed_engine import DeepSpeedEngine

    def fails(*_: object) -> None:
        raise RuntimeError("no accelerator\nand more")

    if world.rank == 0:
        DeepSpeedEngine.__init__ = fails  # type: ignore[method-assign,assignment]
    else:  # its own would wait for the other in DeepSpeed's collectives
        DeepSpeedEngine.__init__ = lambda *_: None  # type: ignore[method-assign,assignment]
    engine = build_engine("auto", small_model(seed=1), *arguments)
    assert engine.name.startswith("FSDP2 stage 2")
    said = ["engine auto: DeepSpeed cannot be initialised (no accelerator); FSDP2 takes its place"]
    assert [line for line in lines if "takes its place" in line] == (said if world.rank == 0 else [])


def test_where_one_rank_has_no_deepspeed_all_take_fsdp_and_say_so() -> None:
    run_ranks(2, check_fallback)
