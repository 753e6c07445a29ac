"""Both back ends against plain PyTorch: the same losses, norms and weights for every stage, world and split."""

from pathlib import Path

import pytest
import torch

from mellow_ds.checkpoint.load import load_checkpoint, load_model_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.snapshot import take_snapshot
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.engine.sharded import own_part
from mellow_ds.engine.step import StepEngine
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.verify.small import batch_of, small_model
from mellow_ds.world import World
from tests.checkpoint.saving import save_step
from tests.engine.cases import EXAMPLES, make_engine, reference, train, with_train
from tests.ranks import run_ranks

CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# back end, stage, accumulation, megabytes up to which a frozen part stays whole, other keys of zero_optimization
CASES = [
    ("deepspeed", 0, 2, 512, {}),
    ("deepspeed", 1, 1, 512, {}),
    ("deepspeed", 2, 2, 512, {}),
    ("deepspeed", 3, 3, 512, {}),
    ("deepspeed", 3, 1, 0, {}),
    ("fsdp", 0, 3, 512, {}),
    ("fsdp", 1, 2, 512, {}),
    ("fsdp", 2, 1, 0, {}),
    ("fsdp", 3, 2, 512, {}),
    ("fsdp", 3, 2, 0, CPU_OFFLOAD),
]


def check_all(world: World, cases: list[tuple]) -> None:
    losses, norms, weights = reference()
    for kind, stage, accumulation, megabytes, zero in cases:
        model = small_model(seed=1)
        audio_tokens = model.num_audio_tokens
        config = with_train(frozen_whole_megabytes=megabytes)
        engine = make_engine(kind, model, stage, world, accumulation, config, **zero)
        found_losses, found_norms = train(engine, audio_tokens, world, accumulation, EXAMPLES)
        torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(found_norms, norms, rtol=1e-5, atol=0)
        check_states(engine, weights)
        check_copies(engine, audio_tokens, world, accumulation)
        engine.close()


def check_copies(engine: StepEngine, audio_tokens: int, world: World, accumulation: int) -> None:
    """What a save keeps stays as it was while training goes on: it is written beside it."""
    snapshot = take_snapshot(engine, world.rank, world.size)
    kept = {name: tensor for tensors in snapshot.tensors.values() for name, tensor in tensors.items()}
    before = {name: tensor.clone() for name, tensor in kept.items()}
    train(engine, audio_tokens, world, accumulation, EXAMPLES[:1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items()), engine.name
    moved = {state.name: state.weight for state in engine.parameter_states() if state.name in kept}
    assert moved
    assert all(not torch.equal(weight, kept[name]) for name, weight in moved.items()), engine.name


def check_states(engine: StepEngine, weights: dict[str, torch.Tensor]) -> None:
    states = list(engine.parameter_states())
    for state in states:
        torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-4)
        assert set(state.moments) == {"exp_avg", "exp_avg_sq"}
        assert state.num_updates == len(EXAMPLES)
    with engine.whole_model() as whole:
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=0, atol=1e-4)
    fixed = dict(engine.fixed_states())
    names = {name for name in small_model(1).state_dict() if not name.startswith("decoder.lm_head")}
    assert names == set(fixed) | {state.name for state in states}  # the tied head is there once, as the embedding
    for name in fixed.keys() & weights.keys():
        assert torch.equal(fixed[name], weights[name])


def test_every_stage_of_both_back_ends_takes_the_steps_of_one_big_batch_on_two_ranks() -> None:
    run_ranks(2, check_all, CASES)


def test_the_pytorch_back_end_on_one_rank_and_three() -> None:
    run_ranks(1, check_all, [("fsdp", 3, 2, 0, {}), ("fsdp", 0, 1, 512, {})])
    run_ranks(3, check_all, [("fsdp", 2, 2, 512, {})])


def save_after_two_steps(world: World, folder: Path, kind: str, stage: int) -> None:
    model = small_model(seed=1)
    audio_tokens = model.num_audio_tokens
    engine = make_engine(kind, model, stage, world)
    train(engine, audio_tokens, world, 2, EXAMPLES[:2])
    save_step(CheckpointStore(folder, 2, Peers(world, engine.device)), 2, engine, {})


def resume(world: World, folder: Path, cases: tuple[tuple[str, int], ...]) -> None:
    losses, norms, weights = reference()
    for kind, stage in cases:
        model = small_model(seed=77)  # another seed: nothing that is not restored can be right by chance
        audio_tokens = model.num_audio_tokens
        load_model_weights(model, folder / "step-000002")
        engine = make_engine(kind, model, stage, world)
        load_checkpoint(folder / "step-000002", engine, world)
        found_losses, found_norms = train(engine, audio_tokens, world, 2, EXAMPLES[2:])
        torch.testing.assert_close(found_losses, losses[2:], rtol=1e-5, atol=0)
        torch.testing.assert_close(found_norms, norms[2:], rtol=1e-5, atol=0)
        check_states(engine, weights)
        engine.close()


def test_a_checkpoint_resumes_on_every_stage_another_world_and_the_other_back_end(tmp_path: Path) -> None:
    """Frozen weights and a buffer come back too."""
    run_ranks(2, save_after_two_steps, tmp_path / "ds", "deepspeed", 2)
    run_ranks(2, save_after_two_steps, tmp_path / "fsdp", "fsdp", 3)
    run_ranks(1, resume, tmp_path / "ds", (("deepspeed", 0), ("deepspeed", 2), ("fsdp", 3)))
    run_ranks(3, resume, tmp_path / "fsdp", (("deepspeed", 1), ("deepspeed", 3), ("fsdp", 1), ("fsdp", 0)))


def check_half_precision(world: World, folder: Path, kind: str) -> None:
    _, _, reference_weights = reference()
    for stage in (0, 1, 2, 3):
        model = small_model(seed=1)
        tokens = model.num_audio_tokens
        engine = make_engine(kind, model, stage, world, 1, precision="bfloat16")
        losses, _ = train(engine, tokens, world, 1, EXAMPLES[:2])
        assert losses == pytest.approx(reference(2)[0], rel=2e-2)
        before = {state.name: state for state in engine.parameter_states()}
        store = CheckpointStore(folder / f"{kind}{stage}", 1, Peers(world, engine.device))
        saved = save_step(store, 2, engine, {"scaler": engine.scaler_state()})
        straight = train(engine, tokens, world, 1, EXAMPLES[2:]), {s.name: s for s in engine.parameter_states()}
        off = [(state.weight - reference_weights[name]).abs().flatten() for name, state in straight[1].items()]
        assert float(torch.cat(off).mean()) < 1e-3, stage  # what bfloat16 makes of four steps: 6e-4
        engine.close()
        again = small_model(seed=5)
        load_model_weights(again, saved)
        engine = make_engine(kind, again, stage, world, 1, precision="bfloat16")
        load_checkpoint(saved, engine, world)
        for state in engine.parameter_states():
            assert torch.equal(state.weight, before[state.name].weight)
            assert not torch.equal(state.weight, state.weight.bfloat16().float()) or state.weight.numel() < 20
            for key, moment in state.moments.items():
                assert torch.equal(moment, before[state.name].moments[key])
        assert train(engine, tokens, world, 1, EXAMPLES[2:]) == straight[0]
        for state in engine.parameter_states():
            assert torch.equal(state.weight, straight[1][state.name].weight), (stage, state.name)
        engine.close()


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_bfloat16_keeps_float32_masters_through_a_checkpoint(tmp_path: Path, kind: str) -> None:
    run_ranks(2, check_half_precision, tmp_path, kind)


def check_muon(world: World, folder: Path) -> None:
    muon = with_train(optimizer_type="Muon")
    for stage in (0, 2, 3):
        model = small_model(seed=1)
        tokens = model.num_audio_tokens
        engine = make_engine("fsdp", model, stage, world, 1, muon)
        train(engine, tokens, world, 1, EXAMPLES[:2])
        saved = save_step(CheckpointStore(folder / str(stage), 1, Peers(world, engine.device)), 2, engine, {})
        straight = train(engine, tokens, world, 1, EXAMPLES[2:]), {s.name: s for s in engine.parameter_states()}
        engine.close()
        again = small_model(seed=5)
        load_model_weights(again, saved)
        engine = make_engine("fsdp", again, stage, world, 1, muon)
        load_checkpoint(saved, engine, world)
        assert train(engine, tokens, world, 1, EXAMPLES[2:]) == straight[0]
        kept = set()
        for state in engine.parameter_states():
            assert torch.equal(state.weight, straight[1][state.name].weight)
            kept.add(tuple(state.moments))
        assert kept == {("momentum_buffer",), ("exp_avg", "exp_avg_sq")}
        engine.close()


def test_muon_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(2, check_muon, tmp_path)


def check_float16(world: World) -> None:
    for stage in (0, 3):
        model = small_model(seed=1)
        tokens = model.num_audio_tokens
        engine = make_engine("fsdp", model, stage, world, 1, precision="float16")
        engine.load_scaler_state({**engine.scaler_state(), "cur_scale": 2.0**40})  # overflows
        before = [state.weight for state in engine.parameter_states()]
        losses, norms = train(engine, tokens, world, 1, EXAMPLES[:1])
        assert norms == [float("inf")]
        assert all(torch.equal(a, s.weight) for a, s in zip(before, engine.parameter_states(), strict=True))
        assert engine.scaler_state()["cur_scale"] == 2.0**39
        engine.load_scaler_state({**engine.scaler_state(), "cur_scale": 2.0**10})
        again, norms = train(engine, tokens, world, 1, EXAMPLES[:1])
        assert again == losses
        assert norms == pytest.approx(reference(1)[1], rel=2e-2)
        assert {state.num_updates for state in engine.parameter_states()} == {1}
        engine.close()


def test_float16_scales_its_loss_and_skips_what_overflows() -> None:
    run_ranks(2, check_float16)


def check_answers_of_any_length(world: World, kind: str) -> None:
    for stage in (0, 2, 3):
        model = small_model(seed=1)
        engine = make_engine(kind, model, stage, world, 1)
        losses: list[float] = []
        for part in (EXAMPLES[:2], EXAMPLES[2:]):  # before the first step too
            with engine.whole_model() as whole:
                for _ in range(1 + 2 * world.rank):  # ranks evaluate batches of their own number and length
                    generate(whole, model.num_audio_tokens, world)
            losses += train(engine, model.num_audio_tokens, world, 1, part)[0]
        assert losses == pytest.approx(reference()[0], rel=1e-5)
        engine.close()


def check_passes_in_step(world: World, kind: str) -> None:
    """Before the first step too: a run that is over already may still be evaluated."""
    config = with_train(frozen_whole_megabytes=0)
    for stage in (0, 1, 2, 3):
        model = small_model(seed=1)
        engine = make_engine(kind, model, stage, world, 1, config)
        assert engine.gathers_weights == (stage == 3)
        losses: list[float] = []
        for part in (EXAMPLES[:2], EXAMPLES[2:]):
            answers = generate_in_step(engine, model.num_audio_tokens, world)
            plain = small_model(seed=1)
            weights = {state.name: state.weight for state in engine.parameter_states()} | dict(engine.fixed_states())
            plain.load_state_dict(weights, strict=False)  # the tied head is the embedding
            assert torch.equal(answers, generate(plain, model.num_audio_tokens, world))
            losses += train(engine, model.num_audio_tokens, world, 1, part)[0]
        assert losses == pytest.approx(reference()[0], rel=1e-5)
        engine.close()


def generate_in_step(engine: StepEngine, audio_tokens: int, world: World) -> torch.Tensor:
    with engine.model_in_step() as model:
        held = sum(p.untyped_storage().nbytes() for p in own_tensors(model.decoder))
        answers = generate(model, audio_tokens, world, synced_gpus=engine.gathers_weights)
        batch = batch_of([1, 2], audio_tokens)
        model.eval()
        with torch.no_grad():
            assert torch.isfinite(model(**batch.model_inputs()).loss_sum)
        model.train()
    if engine.gathers_weights:
        assert sum(p.untyped_storage().nbytes() for p in own_tensors(model.decoder)) <= held
    return answers


def own_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """What a rank holds of each parameter."""
    return [own_part(p.data) for p in module.parameters()]


def generate(
    model: MellowForConditionalGeneration, audio_tokens: int, world: World, synced_gpus: bool = False
) -> torch.Tensor:
    """Answers of another length on each rank."""
    inputs = batch_of([1, 2, 3], audio_tokens).model_inputs()
    del inputs["labels"]
    model.eval()
    answers = model.generate(**inputs, max_new_tokens=3 + 4 * world.rank, pad_token_id=0, synced_gpus=synced_gpus)
    model.train()
    assert isinstance(answers, torch.Tensor)
    return answers


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_ranks_make_passes_together_with_what_they_hold_in_training(kind: str) -> None:
    run_ranks(2, check_passes_in_step, kind, seconds=100)


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_ranks_may_generate_answers_of_any_length_while_training_waits(kind: str) -> None:
    run_ranks(2, check_answers_of_any_length, kind, seconds=100)
