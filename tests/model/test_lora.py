"""Adapters on the decoder: which weights are trained, what they add, saving, merging, and mistakes."""

import dataclasses
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from mellow_ds.config.schema import LoraConfig
from mellow_ds.errors import ConfigError
from mellow_ds.model.assemble import build_model
from mellow_ds.model.lora import adapters_of, add_adapters, is_adapter, merged, plain_name, weights_with_adapters
from mellow_ds.model.modeling import MellowForConditionalGeneration

pytest.importorskip("peft")
ONE = ((0,), "is it a bell? a) yes b) no", "yes")
TWO = ((1, 0), "what is heard in the clip?", "b) a bell, then rain.")


def with_lora(model_config, **fields):
    lora = LoraConfig(**{"rank": 3, "alpha": 6.0, **fields})
    return dataclasses.replace(model_config, decoder=dataclasses.replace(model_config.decoder, lora=lora))


@pytest.fixture
def build(model_config, data_config, tokenizer):
    """(seed, fields of LoraConfig) -> model with adapters, in eval mode."""
    return lambda seed=1, **fields: build_model(with_lora(model_config, **fields), data_config, tokenizer, seed).eval()


def stir(model, seed=5):
    """Adapters that change what the decoder gives."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=draw)
    return model


def merge_all(parameters, names, lora):
    return {
        name: merged(parameters[name], *(parameters[adapter] for adapter in adapters_of(name)), lora, transposed)
        for name, transposed in names.items()
    }


def inputs(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def test_new_adapters_change_nothing_and_leave_the_other_weights_of_the_seed(model, build, lay_out):
    adapted = build()
    own = {plain_name(name): p for name, p in adapted.named_parameters() if not is_adapter(name)}
    plain = dict(model.named_parameters())
    assert list(own) == list(plain)  # in the same order, too
    assert all(torch.equal(own[name], plain[name]) for name in plain)
    batch = inputs(lay_out([ONE, TWO]))
    assert torch.equal(adapted(**batch).logits, model(**batch).logits)
    assert adapted.decoder.lm_head.weight is adapted.decoder.model.embed_tokens.weight
    assert all(name.startswith("decoder.") for name in adapted.state_dict() if is_adapter(name))


def test_the_same_seed_draws_the_same_adapters(build):
    first, again, other = (dict(build(seed).named_parameters()) for seed in (1, 1, 2))
    downs = [name for name in first if "lora_A" in name]
    assert len(downs) == 2 * 7  # q, k, v, o, gate, up, down of two layers
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in downs)
    widest = max(float(first[name].detach().abs().max()) * math.sqrt(first[name].shape[1]) for name in downs)
    assert 0.9 < widest <= 1


def test_only_adapters_of_the_decoder_are_trained(build, lay_out):
    model = stir(build()).train()
    model(**inputs(lay_out([ONE, TWO]))).loss_sum.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    adapters = {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert {name for name in with_gradient if name.startswith("decoder.")} == adapters
    assert any(name.startswith("encoder.") for name in with_gradient)
    model.set_trainable(("projector",))
    assert not any(p.requires_grad for p in model.decoder.parameters())
    model.set_trainable(("decoder",))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters


def test_an_adapter_adds_b_times_a_times_alpha_over_rank(build):
    layer = stir(build(target_modules=("q_proj",))).decoder.model.layers[1].self_attn.q_proj
    x = torch.randn(4, 32)
    expected = x @ layer.base_layer.weight.T
    expected = expected + 2.0 * (x @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T)
    torch.testing.assert_close(layer(x), expected)


def test_dropout_of_adapters_is_for_training_alone(build):
    layer = stir(build(dropout=0.5)).decoder.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 32)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("targets", [("all-linear",), ("v_proj", "self_attn.q_proj")])
def test_a_saved_model_opens_as_the_same_model(build, lay_out, tmp_path, targets):
    model = stir(build(target_modules=targets))
    model.save_pretrained(tmp_path)
    loaded = MellowForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.lora == {"rank": 3, "alpha": 6.0, "dropout": 0.0, "target_modules": list(targets)}
    saved = model.state_dict()
    assert list(loaded.state_dict()) == list(saved)
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    batch = inputs(lay_out([ONE, TWO]))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    generated = [m.generate(**{k: v for k, v in batch.items() if k != "labels"}) for m in (model, loaded)]
    assert torch.equal(*generated)
    loaded.set_trainable(("decoder",))
    assert all(is_adapter(name) for name, p in loaded.named_parameters() if p.requires_grad)


def test_merged_weights_are_those_that_peft_merges(build):
    model = stir(build())
    names = weights_with_adapters(model)
    assert len(names) == 14
    parameters = dict(model.named_parameters())
    own = merge_all(parameters, names, model.config.lora)
    for module in model.decoder.modules():
        if hasattr(module, "lora_A"):
            module.merge(safe_merge=True)
    for name in names:
        torch.testing.assert_close(own[name], parameters[name].detach(), rtol=1e-6, atol=1e-7)


def test_gpt2_whose_weights_lie_the_other_way_even_square_ones():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=32)
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(config).eval()
    lora = {"rank": 2, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
    add_adapters(decoder, lora)
    stir(decoder)
    ids = torch.arange(6)[None]
    expected = decoder(ids).logits
    plain = AutoModelForCausalLM.from_config(config).eval()
    parameters = dict(decoder.named_parameters())
    assert sum("lora_A" in name for name in parameters) == 4  # c_attn, c_proj, c_fc, c_proj
    own = {name: p for name, p in parameters.items() if not is_adapter(name)}
    own.update(merge_all(parameters, weights_with_adapters(decoder), lora))
    own = {plain_name(name): p for name, p in own.items()}
    plain.load_state_dict({**own, "lm_head.weight": own["transformer.wte.weight"]})
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "proj", "embed_tokens"])
def test_a_name_that_no_layer_has_is_refused_with_those_that_are_there(build, target):
    with pytest.raises(ConfigError, match=f"'{target}'.*there are down_proj, gate_proj, k_proj, o_proj, q_proj"):
        build(target_modules=("q_proj", target))


def test_a_frozen_decoder_and_adapters_contradict(model_config, data_config, tokenizer):
    config = with_lora(model_config)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, freeze_gpt_weights=True))
    with pytest.raises(ConfigError, match="freeze_gpt_weights"):
        build_model(config, data_config, tokenizer, seed=1)


def test_without_peft_the_cure_is_named(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'mellow-ds\[lora\]'"):
        build()
