"""The whole model on hand-laid rows: loss, frozen parts, ranks without examples, generation, and saving."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, GPT2Config

from mellow_ds.errors import ConfigError, MellowError
from mellow_ds.model.configuration import MellowConfig, MellowEncoderConfig
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.prompt import encode_answer, encode_prompt

ONE = ((0,), "is it a bell? a) yes b) no", "yes")
TWO = ((1, 0), "what is heard in the clip?", "b) a bell, then rain.")
NONE = ((), "yes", "no! never")


def inputs(batch, *without):
    fields = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in fields.items() if name not in without}


def row_embeddings(model, tokenizer, waveforms, clips, prompt, answer):
    """The sequence spelled out: tokens of each clip and a separator, prompt, answer, end-of-text."""
    words = model.decoder.model.embed_tokens
    audio = model.projector(model.encoder(waveforms))
    parts = [part for clip in clips for part in (audio[clip], words(torch.tensor([0])))]
    parts += [words(torch.tensor(encode_prompt(tokenizer, prompt)))]
    answer_ids = [*encode_answer(tokenizer, answer), 0]
    parts += [words(torch.tensor(answer_ids))]
    return torch.cat(parts), torch.tensor(answer_ids)


def test_the_loss_is_that_of_each_row_run_by_itself(model, tokenizer, waveforms, lay_out):
    examples = [ONE, TWO, NONE]
    losses, counts, all_logits = [], [], []
    for example in examples:
        embeddings, answer = row_embeddings(model, tokenizer, waveforms, *example)
        logits = model.decoder(inputs_embeds=embeddings[None]).logits[0]
        predicting = logits[-len(answer) - 1 : -1]
        losses.append(F.cross_entropy(predicting, answer, reduction="sum"))
        counts.append(len(answer))
        all_logits.append(predicting)
    batch = lay_out(examples)
    output = model(**inputs(batch))
    torch.testing.assert_close(output.loss_sum, sum(losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits, torch.cat(all_logits), rtol=1e-3, atol=1e-4)
    assert int(output.num_answer_tokens) == sum(counts) == batch.num_answer_tokens
    torch.testing.assert_close(output.loss, output.loss_sum / sum(counts))


def test_audio_tokens_stand_where_the_layout_says_and_nowhere_else(model, waveforms, lay_out):
    batch = lay_out([ONE, TWO])
    embeds = model.embed(**inputs(batch, "labels", "attention_mask"))
    words = model.decoder.model.embed_tokens(batch.input_ids)
    audio = model.projector(model.encode(waveforms))
    count = model.num_audio_tokens
    changed = (embeds != words).any(dim=2)
    expected = torch.zeros_like(changed)
    for row, start, clip in ((0, 0, 0), (1, 0, 1), (1, count + 1, 0)):
        expected[row, start : start + count] = True
        torch.testing.assert_close(embeds[row, start : start + count], audio[clip])
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(model, lay_out, side):
    alone = model(**inputs(lay_out([ONE])))
    together = model(**inputs(lay_out([ONE, TWO], side=side)))
    count = int(alone.num_answer_tokens)
    torch.testing.assert_close(together.logits[:count], alone.logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("clips", [3, 0])
@pytest.mark.parametrize("attended", [True, False])
def test_a_batch_without_answers_keeps_every_weight_in_step(model, lay_out, clips, attended):
    batch = lay_out([((0,) if clips else (), "yes", None)])
    batch = dataclasses.replace(batch, waveforms=batch.waveforms[:clips])
    if not attended:
        batch = dataclasses.replace(batch, attention_mask=torch.zeros_like(batch.attention_mask))
    model.train()
    statistics = [buffer.clone() for buffer in model.encoder.buffers()]
    output = model(**inputs(batch))
    assert output.loss_sum == 0
    assert output.loss == 0
    assert int(output.num_answer_tokens) == 0
    output.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.encoder.buffers(), strict=True))
    assert model.encoder.training


def test_every_weight_gets_a_gradient(model, lay_out):
    model.train()
    model(**inputs(lay_out([ONE, TWO]))).loss_sum.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_frozen_encoder_is_a_function_of_the_waveform_alone(model, lay_out):
    model.set_trainable(("projector", "decoder"))
    model.train()
    batch = lay_out([ONE, TWO])
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    features = model.encode(batch.waveforms)
    assert not features.embeddings.requires_grad
    model(**inputs(batch)).loss_sum.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.projector.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.encoder.state_dict().items())
    assert torch.equal(features.embeddings, model.encode(batch.waveforms).embeddings)
    assert not model.encoder.training
    assert model.projector.training
    model.set_trainable(("encoder", "projector", "decoder"))
    assert model.encoder.training


def test_a_frozen_decoder_lets_gradients_through_to_the_projector(model, lay_out):
    model.set_trainable(("encoder", "projector"))
    model.train()
    model(**inputs(lay_out([ONE]))).loss_sum.backward()
    assert all(parameter.grad is None for parameter in model.decoder.parameters())
    assert model.projector.linear1.weight.grad.abs().sum() > 0
    assert model.encoder.net.bn0.weight.grad.abs().sum() > 0
    assert not model.decoder.training


def test_a_frozen_projector_stays_as_it_is(model, lay_out):
    model.set_trainable(("encoder", "decoder"))
    model.train()
    model(**inputs(lay_out([ONE]))).loss_sum.backward()
    assert all(parameter.grad is None for parameter in model.projector.parameters())
    assert model.encoder.net.bn0.weight.grad.abs().sum() > 0
    assert not model.projector.training
    assert model.projector.dropout.p > 0  # which would show, were it in train mode


@pytest.mark.parametrize("first", [(), ("projector",), ("encoder", "decoder")])
def test_parts_are_freed_again_as_a_run_goes_on(model, lay_out, first):
    model.train()
    for parts in (first, ("encoder", "projector", "decoder"), ("projector",)):
        model.set_trainable(parts)
        assert model.trained_parts == set(parts)
        trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        in_training = {name.partition(".")[0] for name, m in model.named_modules() if name and m.training}
        assert trained == in_training == set(parts)
    model(**inputs(lay_out([ONE]))).loss_sum.backward()
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"projector"}


def test_a_part_that_the_model_has_not_is_named(model):
    with pytest.raises(ConfigError, match="no part 'head'; its parts are encoder, projector, decoder"):
        model.set_trainable(("encoder", "head"))


def test_stored_features_give_what_the_waveforms_give(model, lay_out):
    batch = lay_out([ONE, TWO])
    features = model.encode(batch.waveforms)
    stored = model(**inputs(batch, "waveforms"), audio_features=features)
    torch.testing.assert_close(stored.loss_sum, model(**inputs(batch)).loss_sum)


def test_clips_of_another_length_are_refused_not_misplaced(model, lay_out):
    batch = lay_out([ONE])
    with pytest.raises(MellowError, match="3200 samples"):
        model(**{**inputs(batch), "waveforms": torch.zeros(3, 4800)})


def greedy_by_hand(model, batch, steps):
    """One full forward pass a token, without a cache."""
    embeds = model.embed(**inputs(batch, "labels", "attention_mask"))
    attention = batch.attention_mask
    chosen = []
    for _ in range(steps):
        logits = model(inputs_embeds=embeds, attention_mask=attention).logits[:, -1]
        token = logits.argmax(dim=-1)
        chosen.append(token)
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[:, None]], dim=1)
        attention = F.pad(attention, (0, 1), value=1)
    return torch.stack(chosen, dim=1)


@torch.no_grad()
def test_greedy_generation_with_a_cache_is_step_by_step_without(model, lay_out):
    batch = lay_out([(*ONE[:2], None), (*TWO[:2], None), (*NONE[:2], None)], side="left")
    # with its head tied to its embeddings an untrained decoder repeats its last word; a wilder one does not
    for name, weight in model.decoder.named_parameters():
        if "proj" in name:
            weight.mul_(20)
    expected = greedy_by_hand(model, batch, 8)
    assert len(expected.unique()) > 3
    found = model.generate(**inputs(batch, "labels"), max_new_tokens=8, eos_token_id=None)
    assert torch.equal(found, expected)
    again = model.generate(**inputs(batch, "labels"), max_new_tokens=8)
    for row, full in zip(again.tolist(), expected.tolist(), strict=True):
        length = full.index(0) + 1 if 0 in full else 8
        assert row[:length] == full[:length]
        assert not any(row[length:])


@torch.no_grad()
def test_beams_and_sampling_run(model, lay_out):
    batch = lay_out([(*ONE[:2], None), (*TWO[:2], None)], side="left")
    beams = model.generate(**inputs(batch, "labels"), max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 4
    drawn = model.generate(**inputs(batch, "labels"), max_new_tokens=4, do_sample=True, eos_token_id=None)
    assert drawn.shape == (2, 4)


def test_clips_are_encoded_once_a_generation(model, lay_out, monkeypatch):
    calls = []
    run = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda waveforms: calls.append(1) or run(waveforms))
    batch = lay_out([(*ONE[:2], None)], side="left")
    model.generate(**inputs(batch, "labels"), max_new_tokens=5, eos_token_id=None)
    assert len(calls) == 1


@pytest.mark.usefixtures("offline")
def test_a_saved_model_is_read_back_bit_for_bit(model, lay_out, tmp_path):
    model.save_pretrained(tmp_path)
    read = MellowForConditionalGeneration.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), read.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read.decoder.lm_head.weight is read.decoder.model.embed_tokens.weight
    batch = lay_out([ONE, TWO])
    assert torch.equal(read(**inputs(batch)).loss_sum, model(**inputs(batch)).loss_sum)
    assert read.generation_config.eos_token_id == 0
    assert read.decoder.config._attn_implementation == model.decoder.config._attn_implementation == "sdpa"


def encoder_config() -> MellowEncoderConfig:
    return MellowEncoderConfig(
        kind="Cnn14", channels=(4, 8), out_emb=8, num_classes=3, sampling_rate=8000, window_size=256, fmax=4000.0
    )


def test_a_decoder_with_positions_of_its_own_counts_from_the_first_real_token():
    """GPT-2 adds a vector for each position: left padding must not shift them."""
    config = MellowConfig(
        encoder_config=encoder_config(),
        text_config=GPT2Config(vocab_size=20, n_embd=16, n_head=2, n_layer=1, n_positions=32),
    )
    model = MellowForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    plain = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    shifted = model(input_ids=F.pad(ids, (3, 0)), attention_mask=F.pad(torch.ones_like(ids), (3, 0))).logits
    torch.testing.assert_close(shifted[:, 3:], plain, rtol=1e-4, atol=1e-5)


def test_a_decoder_that_caps_its_logits_is_refused():
    config = MellowConfig(encoder_config=encoder_config(), text_config=Gemma2Config(num_hidden_layers=1))
    with pytest.raises(MellowError, match="final_logit_softcapping"):
        MellowForConditionalGeneration(config)


def test_weights_of_the_encoder_are_not_all_alike(model):
    weight = model.encoder.net.conv_block1.conv2.weight
    bound = (6 / (4 * 9 + 4 * 9)) ** 0.5  # Xavier's
    assert weight.abs().max() <= bound
    assert weight.std() > bound / 4


def test_a_cast_model_is_what_transformers_loads_in_that_format(model, tmp_path, lay_out):
    model.save_pretrained(tmp_path)
    loaded = MellowForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    frequencies = model.decoder.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(frequencies, frequencies.bfloat16().float())  # rounding would show
    model.bfloat16()
    assert torch.equal(model.decoder.model.rotary_emb.inv_freq, frequencies)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype, name
    batch = inputs(lay_out([ONE, TWO]))
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
