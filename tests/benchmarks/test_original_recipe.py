"""The plain original recipe: against what the original recorded, and against the project in Mellow's layout."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from original_recipe import OriginalRecipe, pad_text
from project_side import model_inputs, original_batch, project_batch
from transformers import ClapAudioConfig, LlamaConfig
from workload import END_ID, END_SUFFIX, PAD_ID, draw_examples

from mellow_ds.model.configuration import HTSAT
from mellow_ds.model.published import drop_computed, rename_encoder
from mellow_ds.prompt import Layout

MELLOW_LAYOUT = Layout(
    audio_tokens=129,
    separator_id=END_ID,
    end_id=END_ID,
    max_prompt_tokens=129,
    max_answer_tokens=250,
    num_clips=2,
    prompt_suffix=END_SUFFIX,
    prompt_pad_id=PAD_ID,
)


@pytest.fixture
def examples():
    return draw_examples(3, seed=2, vocab_size=400)


def seen_lengths(original):
    """Positions of each call that reach the decoder's head."""
    lengths = []
    original.decoder.get_output_embeddings().register_forward_hook(
        lambda _, __, output: lengths.append(output.shape[1])
    )
    return lengths


def test_text_is_ended_and_padded_or_cut():
    assert pad_text((7, 8), (216, 0), 17, 6) == [7, 8, 216, 0, 17, 17]
    assert pad_text((7, 8, 9), (216, 0), 17, 4) == [7, 8, 9, 216]


def test_an_example_is_639_positions_and_all_get_logits(original, examples, waveforms):
    lengths = seen_lengths(original)
    batch = original_batch(examples, waveforms)
    original(batch.first, batch.second, batch.prompt_ids, batch.answer_ids)
    assert lengths == [639]


@torch.no_grad()
def make_wild(*decoders):
    """Scale up projections: a small untrained decoder hardly hears its context and, its head tied to its embeddings,
    repeats its last word."""
    for decoder in decoders:
        for name, weight in decoder.named_parameters():
            if "proj" in name:
                weight.mul_(20)


def test_the_loss_is_the_project_s_in_mellow_s_layout(models, original, examples, waveforms):
    make_wild(models[129].decoder, original.decoder)
    # the project ends an answer with end-of-text, the original with " <|endoftext|>", which is one token more
    ended = [dataclasses.replace(example, answer_ids=(*example.answer_ids, 216)) for example in examples]
    model = models[129].eval()
    batch = original_batch(examples, waveforms)
    with torch.no_grad():
        own = model(**model_inputs(project_batch(ended, waveforms, MELLOW_LAYOUT)))
        loss = original.eval()(batch.first, batch.second, batch.prompt_ids, batch.answer_ids)
    assert int(own.num_answer_tokens) == sum(len(example.answer_ids) + 2 for example in examples)
    torch.testing.assert_close(own.loss, loss, rtol=1e-5, atol=1e-5)
    # and it hangs on the audio tokens: turned round, they give another loss
    with torch.no_grad():
        original.projection.layer_norm.weight.neg_()
        other = original(batch.first, batch.second, batch.prompt_ids, batch.answer_ids)
    assert abs(float(other - loss)) > 1e-3


def test_it_generates_what_the_project_generates_in_mellow_s_layout(models, original, examples, waveforms):
    make_wild(models[129].decoder, original.decoder)
    inputs = model_inputs(project_batch(examples, waveforms, MELLOW_LAYOUT, for_generation=True))
    del inputs["labels"]
    found = models[129].eval().generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    lengths = seen_lengths(original)
    batch = original_batch(examples, waveforms)
    stream = original.eval().generate(batch.first, batch.second, batch.prompt_ids)
    expected = torch.stack([next(stream) for _ in range(6)], dim=1)
    assert len(expected.unique()) > 3
    assert torch.equal(found, expected)
    assert lengths == [389, 390, 391, 392, 393, 394]  # the whole sequence each time
    assert torch.is_grad_enabled()


def test_the_frozen_encoder_stays_in_train_mode_without_gradients(original):
    original.train()
    assert all(module.training for module in original.modules())
    trained = {name.split(".")[0] for name, parameter in original.named_parameters() if parameter.requires_grad}
    frozen = {
        ".".join(name.split(".")[:2]) for name, parameter in original.named_parameters() if not parameter.requires_grad
    }
    assert trained == {"encoder", "projection", "decoder"}  # of the encoder c2l alone
    assert frozen == {"encoder.trunk", "encoder.tscam_conv"}


@pytest.mark.slow
def test_it_computes_what_the_original_recorded(shared_dir):
    parity = shared_dir / "parity"
    spec = importlib.util.spec_from_file_location("parity_state", parity / "state.py")
    state = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(state)
    expected = np.load(parity / "expected.npz")
    original = recorded_network(state, parity)

    clips = torch.from_numpy(state.waveforms())
    prompt_ids, answer_ids = (torch.from_numpy(ids).long() for ids in state.token_ids(160))
    with torch.no_grad():
        tokens = original.audio_tokens(clips)
        logits = original.answer_logits(clips, clips.flip(0), prompt_ids, answer_ids)
        loss = original(clips, clips.flip(0), prompt_ids, answer_ids)
    np.testing.assert_allclose(tokens.numpy(), expected["htsat_llama.audio_tokens"], atol=1e-3)
    np.testing.assert_allclose(logits.numpy(), expected["htsat_llama.answer_logits"], atol=1e-3)
    np.testing.assert_allclose(float(loss), float(expected["htsat_llama.loss"]), atol=1e-3)


def recorded_network(state, parity):
    """The network whose outputs are recorded, in eval mode."""
    text_config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    trunk = ClapAudioConfig(spec_size=256, patch_stride=[4, 4], num_mel_bins=64, window_size=8)
    original = OriginalRecipe(trunk, text_config, num_classes=527, end_id=0, pad_id=-1)  # nothing is padded there
    computed = set(json.loads((parity / "htsat_llama_computed_keys.json").read_text()))
    saved = {
        name: torch.from_numpy(array)
        for name, array in state.state_dict(parity / "htsat_llama_keys.json").items()
        if name not in computed
    }
    prefixes = {"audio_encoder.base.htsat.": "", "caption_decoder.lm.": "decoder."}
    prefixes |= {"audio_encoder.base.c2l.": "encoder.c2l.", "audio_encoder.projection.": "projection."}
    tensors, encoder = {}, {}
    for name, tensor in drop_computed(saved).items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        room = tensors if prefixes[prefix] else encoder
        room[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    tensors |= {f"encoder.{name}": tensor for name, tensor in rename_encoder(HTSAT, encoder).items()}
    tensors["decoder.lm_head.weight"] = tensors["decoder.model.embed_tokens.weight"]  # tied
    missing, unexpected = original.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert [name for name in missing if not _constant(name)] == []
    return original.eval()


def _constant(name):
    """Buffers that are computed, not learned: the front end and the index of relative positions."""
    return name.startswith("encoder.mel.") or name.endswith("relative_position_index")
