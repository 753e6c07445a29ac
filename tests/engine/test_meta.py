"""A decoder on the meta device: read a block at a time by whatever shards it, and the same weights as a whole one."""

import torch
from torch.distributed.tensor import DTensor

from mellow_ds.engine.build import build_engine, shards_parameters
from mellow_ds.model.meta import has_meta, parameters_on_meta
from mellow_ds.verify.small import small_model
from mellow_ds.world import World
from tests.engine.cases import ENGINES, EXAMPLES, reference, shape, train, with_train
from tests.ranks import run_ranks


def with_meta_decoder() -> torch.nn.Module:
    """The small model, its decoder's parameters without memory."""
    model = small_model(seed=1)
    with parameters_on_meta():
        decoder = type(model.decoder)(model.decoder.config)
    model.decoder = decoder
    model.set_trainable(("projector", "decoder"))
    return model.train()


def check(world: World) -> None:
    losses, norms, weights = reference()
    whole = small_model(seed=1).state_dict()
    for kind, stage in (("deepspeed", 3), ("fsdp", 3), ("fsdp", 1)):
        model = with_meta_decoder()
        assert has_meta(model)
        tokens = model.num_audio_tokens
        asked: list[str] = []

        def read(name: str, asked: list[str] = asked) -> torch.Tensor:
            asked.append(name)
            return whole[name]

        json = {"zero_optimization": {"stage": stage}}
        engine = ENGINES[kind](model, json, shape(world, 2), with_train(), torch.device("cpu"), read)
        assert not has_meta(model)
        assert sorted(asked) == sorted(n for n, _ in small_model(1).named_parameters() if n.startswith("decoder."))
        found_losses, found_norms = train(engine, tokens, world, 2, EXAMPLES)
        torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(found_norms, norms, rtol=1e-5, atol=0)
        for state in engine.parameter_states():
            torch.testing.assert_close(state.weight, weights[state.name], rtol=0, atol=1e-4)
        engine.close()


def test_a_decoder_on_the_meta_device_trains_as_a_whole_one() -> None:
    run_ranks(2, check)


def check_half(world: World) -> None:
    whole = small_model(seed=1).state_dict()
    for kind in ("deepspeed", "fsdp"):
        found = []
        for model, read in ((small_model(seed=1), None), (with_meta_decoder(), whole.__getitem__)):
            json = {"zero_optimization": {"stage": 3}}
            engine = ENGINES[kind](model, json, shape(world, 1, "bfloat16"), with_train(), torch.device("cpu"), read)
            found.append(train(engine, small_model(1).num_audio_tokens, world, 1, EXAMPLES)[0])
            engine.close()
        torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=0)


def test_in_bfloat16_too() -> None:
    run_ranks(2, check_half)


def check_muon(world: World) -> None:
    whole = small_model(seed=1).state_dict()
    config = with_train(optimizer_type="Muon")
    for stage, is_sharded in ((0, False), (1, True), (2, True), (3, True)):
        engine_json = {"zero_optimization": {"stage": stage}}
        assert shards_parameters("auto", engine_json, "Muon") == is_sharded
        model, cpu = with_meta_decoder(), torch.device("cpu")
        engine = build_engine("auto", model, engine_json, shape(world, 2), config, cpu, whole.__getitem__)
        assert engine.name.startswith("FSDP2" if is_sharded else "DDP")
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters()) == is_sharded
        engine.close()


def test_muon_under_engine_auto_is_sharded_as_by_engine_fsdp() -> None:
    run_ranks(2, check_muon)


def test_what_shards_parameters() -> None:
    def stages(kind: str) -> list[int]:
        jsons = {stage: {"zero_optimization": {"stage": stage}} for stage in range(4)}
        return [stage for stage, engine_json in jsons.items() if shards_parameters(kind, engine_json, "AdamW")]

    assert stages("auto") == stages("deepspeed") == [3]
    assert stages("fsdp") == [1, 2, 3]
