"""Blocks that run again in the backward pass, or compiled: the same numbers, less memory, the same names."""

import copy
import dataclasses
import logging

import pytest
import torch

from mellow_ds.config.schema import DataConfig, EncoderConfig
from mellow_ds.model import blocks as blocks_module
from mellow_ds.model.assemble import build_model
from mellow_ds.model.blocks import blocks_of, compile_blocks, recompute_activations
from mellow_ds.model.configuration import MellowConfig, MellowEncoderConfig
from mellow_ds.model.modeling import MellowForConditionalGeneration

ALL = ("encoder", "projector", "decoder")
ONE = ((0,), "is it a bell? a) yes b) no", "yes")
TWO = ((1, 0), "what is heard in the clip?", "b) a bell, then rain.")
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 128,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
OPT = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 2,
       "vocab_size": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}  # fmt: skip


def inputs(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def step(model, batch, seed=3):
    """(loss, gradients, buffers after it, bytes kept between the passes)."""
    torch.manual_seed(seed)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs(batch)).loss_sum
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return loss.detach(), gradients, buffers, sum(size for pointer, size in kept.items() if pointer not in own)


def check_same(model, again, batch):
    """One step of each; returns how many times less is kept."""
    names = list(model.state_dict())
    assert recompute_activations(again) > 0
    assert list(again.state_dict()) == names
    loss, gradients, buffers, size = step(model, batch)
    loss_again, gradients_again, buffers_again, size_again = step(again, batch)
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-6, atol=1e-8, msg=name)
    assert all(torch.equal(buffer, buffers_again[name]) for name, buffer in buffers.items())
    return size / size_again


@pytest.fixture
def wild(model):
    """Cnn14 with dropout and a decoder with dropout, all of it trained."""
    config = MellowConfig(encoder_config=model.config.encoder_config, text_config=GPT2, projector_dropout=0.5)
    torch.manual_seed(1)
    return MellowForConditionalGeneration(config).train()


@pytest.mark.parametrize("parts", [ALL, ("projector",), ("projector", "decoder"), ("encoder",)])
def test_the_same_step_in_less_memory(wild, lay_out, parts):
    assert wild.encoder.net.dropout.p > 0
    assert wild.decoder.transformer.h[0].mlp.dropout.p > 0
    wild.set_trainable(parts)
    assert check_same(wild, copy.deepcopy(wild), lay_out([ONE, TWO])) > 1.5


def test_a_trained_cnn14_moves_its_statistics_once(model, lay_out):
    model.train()
    assert recompute_activations(model.encoder) == 2
    assert int(model.encoder.net.conv_block1.bn1.num_batches_tracked) == 0
    before = model.encoder.net.conv_block1.bn1.running_mean.clone()
    _, _, buffers, _ = step(model, lay_out([ONE]))
    assert not torch.equal(before, model.encoder.net.conv_block1.bn1.running_mean)
    assert int(buffers["encoder.net.conv_block1.bn1.num_batches_tracked"]) == 1


def test_a_frozen_decoder_with_dropout_in_its_blocks_stays_frozen(model, lay_out):
    """OPT's blocks ask their own `training` for dropout."""
    config = MellowConfig(encoder_config=model.config.encoder_config, text_config=OPT, projector_dropout=0.0)
    torch.manual_seed(1)
    model = MellowForConditionalGeneration(config).train()
    model.set_trainable(("projector",))
    again = copy.deepcopy(model)
    check_same(model, again, lay_out([ONE, TWO]))
    assert torch.equal(step(again, lay_out([ONE]), seed=3)[0], step(again, lay_out([ONE]), seed=4)[0])


def small_htsat(**trunk):
    fields = {"patch_embeds_hidden_size": 8, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 2, 2], **trunk}
    return MellowEncoderConfig(
        kind="HTSAT", sampling_rate=8000, clip_samples=3200, fmax=4000.0, num_classes=5, out_emb=64, trunk=fields
    )


def test_the_stages_of_a_trained_htsat_too(lay_out, model):
    config = MellowConfig(encoder_config=small_htsat(), text_config=model.config.text_config, projector_dropout=0.5)
    torch.manual_seed(1)
    htsat = MellowForConditionalGeneration(config).train()
    assert htsat.encoder.net.trunk.config.drop_path_rate > 0
    assert len(list(blocks_of(htsat.encoder))) == 4
    batch = lay_out([((0,), "yes", "no! never")])
    long = torch.zeros(1, 33, dtype=torch.long)  # room for HTSAT's 33 tokens
    batch = dataclasses.replace(
        batch,
        input_ids=torch.cat([long, batch.input_ids], dim=1),
        attention_mask=torch.cat([torch.ones_like(long), batch.attention_mask], dim=1),
        labels=torch.cat([torch.full_like(long, -100), batch.labels], dim=1),
    )
    assert check_same(htsat, copy.deepcopy(htsat), batch) > 1.5


@pytest.mark.slow
def test_a_conformer_too(model, lay_out):
    """wav2vec2-conformer: convolutions, and BatchNorm in each block."""
    trunk = {
        "model_type": "wav2vec2-conformer", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [8, 80],
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "conv_depthwise_kernel_size": 5,
        "position_embeddings_type": None,
    }  # fmt: skip
    encoder = MellowEncoderConfig(
        kind="waveform", sampling_rate=16_000, clip_samples=3200, out_emb=16, audio_tokens=11, trunk=trunk
    )
    config = MellowConfig(encoder_config=encoder, text_config=model.config.text_config, projector_dropout=0.5)
    torch.manual_seed(1)
    conformer = MellowForConditionalGeneration(config).train()
    assert any(name.endswith("running_mean") for name, _ in conformer.named_buffers())
    assert conformer.num_audio_tokens == model.num_audio_tokens
    check_same(conformer, copy.deepcopy(conformer), lay_out([ONE, TWO]))


def test_generation_fills_its_cache_once(wild, lay_out):
    wild.eval()
    batch = {
        k: v for k, v in inputs(lay_out([(*ONE[:2], None), (*TWO[:2], None)], side="left")).items() if k != "labels"
    }
    expected = wild.generate(**batch, max_new_tokens=5)
    recompute_activations(wild)
    assert torch.equal(wild.generate(**batch, max_new_tokens=5), expected)
    logits = wild(**batch).logits  # with a gradient, and with a cache
    logits.sum().backward()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_under_the_same_names(model, lay_out):
    model.train()
    model.projector.dropout.p = model.encoder.net.dropout.p = 0.0
    compiled = copy.deepcopy(model)
    assert compile_blocks(compiled.decoder) == 2
    assert list(compiled.state_dict()) == list(model.state_dict())
    torch._dynamo.utils.counters.clear()
    for again in (False, True):
        if again:
            recompute_activations(compiled)
        for batch in (lay_out([ONE]), lay_out([ONE, TWO])):
            loss, gradients, _, size = step(model, batch)
            loss_compiled, gradients_compiled, _, size_compiled = step(compiled, batch)
            torch.testing.assert_close(loss_compiled, loss, rtol=1e-5, atol=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradients_compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
            assert not again or size > 1.5 * size_compiled
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    copied = copy.deepcopy(compiled)
    assert vars(copied.decoder.model.layers[0])["forward"]._block is copied.decoder.model.layers[0]


def test_without_a_compiler_one_warning_and_the_blocks_as_they_are(model, lay_out, monkeypatch, caplog):
    def missing(*_, **__):
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: missing)
    caplog.set_level(logging.WARNING)
    loss = step(model, lay_out([ONE]))[0]
    assert compile_blocks(model.decoder) == 0
    assert [record.message for record in caplog.records] == [
        "torch.compile does not work here (no C++ compiler was found): train.compile changes nothing, the decoder's "
        "blocks run as they are"
    ]
    assert torch.equal(step(model, lay_out([ONE]))[0], loss)


def test_a_block_that_cannot_be_compiled_runs_as_it_is(model, lay_out, monkeypatch, caplog):
    def refused(*_, **__):
        raise torch._dynamo.exc.Unsupported("a block of clay")

    loss = step(model, lay_out([ONE]))[0]
    monkeypatch.setattr(blocks_module, "_compiler_works", lambda _: True)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: refused)
    caplog.set_level(logging.WARNING)
    assert compile_blocks(model.decoder) == 2
    assert torch.equal(step(model, lay_out([ONE]))[0], loss)
    assert len(caplog.records) == 1
    assert "LlamaDecoderLayer cannot be compiled (a block of clay)" in caplog.text


def test_blocks_of_a_recipe(model_config, data_config: DataConfig, tokenizer):
    wide = dataclasses.replace(model_config, encoder=EncoderConfig(**{
        **vars(model_config.encoder), "channels": (4, 4, 4, 8)
    }))  # fmt: skip
    model = build_model(wide, data_config, tokenizer, seed=0)
    assert [type(block).__name__ for block in blocks_of(model)] == ["ConvBlock"] * 4 + ["LlamaDecoderLayer"] * 2
