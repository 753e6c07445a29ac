"""DeepSpeed against plain PyTorch: the same losses, norms and weights for every ZeRO stage, world and split."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from mellow_ds.checkpoint import CheckpointStore, load_checkpoint, load_model_weights
from mellow_ds.config.schema import MixedPrecisionConfig
from mellow_ds.ds_config import StepShape, choose_precision, read_engine_json
from mellow_ds.engine.deepspeed_engine import DeepSpeedEngine, avoid_cpu_compilation
from mellow_ds.engine.optimizer import parameter_groups
from mellow_ds.errors import CheckpointError, ConfigError
from mellow_ds.trainer import agreement
from mellow_ds.world import World
from tests.engine.small import TRAIN, batch_of, small_model
from tests.ranks import run_ranks

NUM_STEPS = 4
EXAMPLES = [list(range(7 * step, 7 * step + 7)) for step in range(NUM_STEPS - 1)] + [[50]]  # the last has one example


def reference(num_steps: int = NUM_STEPS) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of one process with one big batch, in plain PyTorch."""
    model = small_model(seed=1)
    optimizer = torch.optim.AdamW(parameter_groups(model, TRAIN.weight_decay), lr=TRAIN.learning_rate)
    losses, norms = [], []
    for numbers in EXAMPLES[:num_steps]:
        batch = batch_of(numbers, model.num_audio_tokens)
        loss = model(**inputs(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.max_grad_norm)))
        optimizer.step()
        losses.append(float(loss))
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def inputs(batch):
    return {name: value for name, value in vars(batch).items() if name != "example_ids"}


def shape(world: World, accumulation: int) -> StepShape:
    return StepShape(
        world.size, 4, accumulation, TRAIN.max_grad_norm, TRAIN.learning_rate, TRAIN.weight_decay, "float32"
    )


def make_engine(model, stage: int, world: World, accumulation: int = 2):
    return DeepSpeedEngine(
        model, {"zero_optimization": {"stage": stage}}, shape(world, accumulation), TRAIN, torch.device("cpu")
    )


def micro_batches(numbers: list[int], world: World, accumulation: int, audio_tokens: int):
    """This rank's part of the step, cut unevenly, some of it empty."""
    n = len(numbers)
    own = numbers[n * world.rank // world.size : n * (world.rank + 1) // world.size]
    cuts = [len(own) * part // accumulation for part in range(accumulation + 1)]
    return [batch_of(own[a:b], audio_tokens) for a, b in pairwise(cuts)]


def train(engine, audio_tokens: int, world: World, accumulation: int, steps: list[list[int]]):
    results = [
        engine.train_step(micro_batches(n, world, accumulation, audio_tokens), TRAIN.learning_rate, TRAIN.max_grad_norm)
        for n in steps
    ]
    return [r.loss for r in results], [r.grad_norm for r in results]


def check_stage(world: World, stage: int, accumulation: int) -> None:
    losses, norms, weights = reference()
    model = small_model(seed=1)
    audio_tokens = model.num_audio_tokens
    engine = make_engine(model, stage, world, accumulation)
    found_losses, found_norms = train(engine, audio_tokens, world, accumulation, EXAMPLES)
    torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_norms, norms, rtol=1e-5, atol=0)
    for state in engine.parameter_states():
        torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-4)
        assert set(state.moments) == {"exp_avg", "exp_avg_sq"}
    with engine.whole_model() as whole:
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=1e-4)
    engine.close()


def check_all_stages(world: World) -> None:
    for stage, accumulation in ((0, 2), (1, 1), (2, 2), (3, 3)):
        check_stage(world, stage, accumulation)


def test_every_stage_takes_the_steps_of_one_big_batch_on_two_ranks() -> None:
    run_ranks(2, check_all_stages)


def save_after_two_steps(world: World, folder: Path) -> None:
    model = small_model(seed=1)
    audio_tokens = model.num_audio_tokens
    engine = make_engine(model, 2, world)
    train(engine, audio_tokens, world, 2, EXAMPLES[:2])
    CheckpointStore(folder, 2, world, agreement(engine.device)).save(2, engine, {"num_updates": 2})


def resume(world: World, folder: Path, stages: tuple[int, ...]) -> None:
    losses, norms, weights = reference()
    for stage in stages:
        model = small_model(seed=77)  # another seed: nothing that is not restored can be right by chance
        audio_tokens = model.num_audio_tokens
        load_model_weights(model, folder / "step-000002")
        engine = make_engine(model, stage, world)
        load_checkpoint(folder / "step-000002", engine, world)
        found_losses, found_norms = train(engine, audio_tokens, world, 2, EXAMPLES[2:])
        torch.testing.assert_close(found_losses, losses[2:], rtol=1e-5, atol=0)
        torch.testing.assert_close(found_norms, norms[2:], rtol=1e-5, atol=0)
        for state in engine.parameter_states():
            torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-4)
        engine.close()


def test_a_checkpoint_resumes_on_every_stage_and_another_world(tmp_path: Path) -> None:
    """Saved by ZeRO-2 on 2 ranks; frozen weights and a buffer come back too, on 1 rank and on 3."""
    run_ranks(2, save_after_two_steps, tmp_path)
    run_ranks(1, resume, tmp_path, (0, 1, 2))
    run_ranks(3, resume, tmp_path, (1, 3))


def check_half_precision(world: World, folder: Path) -> None:
    """bfloat16: master weights and moments come back whole, also where the module holds rounded weights."""
    for stage in (0, 1, 2, 3):
        half = replace(shape(world, 1), precision="bfloat16")
        model = small_model(seed=1)
        engine = DeepSpeedEngine(model, {"zero_optimization": {"stage": stage}}, half, TRAIN, torch.device("cpu"))
        train(engine, small_model(1).num_audio_tokens, world, 1, EXAMPLES[:2])
        before = {state.name: state for state in engine.parameter_states()}
        store = CheckpointStore(folder / str(stage), 1, world, agreement(engine.device))
        saved = store.save(2, engine, {"num_updates": 2, "scaler": engine.scaler_state()})
        engine.close()
        again = small_model(seed=5)
        load_model_weights(again, saved)
        engine = DeepSpeedEngine(again, {"zero_optimization": {"stage": stage}}, half, TRAIN, torch.device("cpu"))
        load_checkpoint(saved, engine, world)
        for state in engine.parameter_states():
            assert torch.equal(state.weight, before[state.name].weight)
            assert not torch.equal(state.weight, state.weight.bfloat16().float()) or state.weight.numel() < 20
            for key, moment in state.moments.items():
                assert torch.equal(moment, before[state.name].moments[key])
        engine.close()


def test_bfloat16_keeps_float32_masters_through_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(2, check_half_precision, tmp_path)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = small_model(seed=1)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    state.update({name: b.clone() for name, b in model.named_buffers() if name in model.state_dict()})
    name = "projector.linear1.weight"
    state[name] = torch.zeros(3, 3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is \[3, 3\] there and \[16, 8\] as configured"):
        load_model_weights(model, tmp_path)
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load_model_weights(model, tmp_path)
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="it has extra"):
        load_model_weights(model, tmp_path)


def test_the_private_switch_that_avoids_compiling_is_still_there() -> None:
    """FACTS: two ranks wait two minutes for deepspeed_shm_comm; the name is private to DeepSpeed 0.19."""
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    avoid_cpu_compilation()
    assert torch.cuda.is_available() or not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


def check_every_file(world: World, folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        engine_json = read_engine_json(str(path))
        precision = choose_precision(MixedPrecisionConfig(), engine_json, has_gpu=False)
        chosen = replace(shape(world, 1), precision=precision)
        if precision == "float16" and not get_accelerator().is_fp16_supported():
            with pytest.raises(ConfigError, match="float16 is not supported by DeepSpeed on this cpu: take bfloat16"):
                DeepSpeedEngine(small_model(seed=1), engine_json, chosen, TRAIN, torch.device("cpu"))
            continue
        engine = DeepSpeedEngine(small_model(seed=1), engine_json, chosen, TRAIN, torch.device("cpu"))
        audio_tokens = small_model(seed=1).num_audio_tokens
        losses, _ = train(engine, audio_tokens, world, 1, EXAMPLES[:2])
        expected = reference(2)[0]
        tolerance = 1e-5 if precision == "float32" else 2e-2
        assert losses == pytest.approx(expected, rel=tolerance), path.name
        assert precision in engine.name
        engine.close()


def test_every_shipped_engine_file_trains() -> None:
    """ZeRO 0 to 3, offload, bf16: two steps of the reference on a CPU; fp16, where it has none, is one clear line."""
    run_ranks(2, check_every_file, Path(__file__).resolve().parent.parent.parent / "ds_configs")
