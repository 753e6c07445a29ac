"""What is counted on the meta device against what autograd saves when real tensors go through a real decoder."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mellow_ds.config.load import load_run_config
from mellow_ds.doctor.activations import _counted, _decoder_bytes, _total
from mellow_ds.doctor.sizes import model_facts

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 50,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 5, "n_head": 4, "vocab_size": 50, "attn_pdrop": 0.0}


def saved_for_real(fields: dict, rows: int, tokens: int) -> int:
    """Bytes that a forward pass of the whole decoder saves, by torch's own fused attention."""
    config = AutoConfig.for_model(**fields)
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    embeds = torch.randn(rows, tokens, config.hidden_size, requires_grad=True)
    with _counted(decoder) as saved:
        decoder.base_model(inputs_embeds=embeds, attention_mask=None, use_cache=False)
    return _total(saved)


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_real_pass_saves_what_is_counted(fields: dict) -> None:
    layer, base = _decoder_bytes(AutoConfig.for_model(**fields), torch.float32)
    rows, tokens = 3, 48
    assert rows * tokens * (5 * layer + base) == pytest.approx(saved_for_real(fields, rows, tokens), rel=0.05)


def test_a_decoder_that_cannot_be_made_shapeless_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("no such thing on meta")

    monkeypatch.setattr("mellow_ds.doctor.activations._shallow_decoder_bytes", broken)
    layer, _ = _decoder_bytes(AutoConfig.for_model(**LLAMA), torch.bfloat16)
    assert layer == 34 * 64  # Korthikanti et al. 2022: 34 s b h bytes without scores


def test_sizes_of_published_models() -> None:
    """Parameters as published: HTSAT's trunk and head, SmolLM2-135M (134,515,008), GPT-2 (124,439,808)."""
    for recipe, decoder in (("mellow", 134_515_008), ("mellow-gpt2", 124_439_808)):
        facts = model_facts(load_run_config(recipe), "bfloat16", 100_000)
        assert facts.part("decoder").num_parameters == decoder
        assert facts.part("encoder").is_frozen
        assert facts.is_tied
        assert facts.has_position_table == (recipe == "mellow-gpt2")
        assert "published sizes" in facts.origin
        width = facts.activations.block_token_bytes
        assert 15 * width < facts.activations.layer_token_bytes < 40 * width


def test_a_trained_encoder_keeps_activations_and_a_frozen_one_none() -> None:
    frozen = model_facts(load_run_config("mellow"), "float32", 100_000)
    trained = model_facts(
        load_run_config("mellow", {"model.encoder.freeze_audio_encoder_weights": "false"}), "float32", 100_000
    )
    assert frozen.activations.encoder_clip_bytes == 0
    # 4,096 tokens of width 96 and deeper stages of half the numbers each: some hundred of MB a clip
    assert 1e8 < trained.activations.encoder_clip_bytes < 2e9
    assert trained.num_trained == trained.num_parameters


def test_adapters_alone_are_trained() -> None:
    pytest.importorskip("peft")
    overrides = {"model.decoder.lora.rank": "2", "model.decoder.lora.target_modules": "[q_proj, v_proj]"}
    facts = model_facts(load_run_config("quickstart", overrides), "float32", 100_000)
    # 3 layers, two projections of 128 to 128, rank 2: A [2, 128], B [128, 2]
    assert facts.part("decoder").num_trained == facts.part("decoder").num_adapters == 3 * 2 * 2 * (2 * 128)
