"""From the run configuration to tokenizer, layout and model; what does not belong together is refused by name."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Wav2Vec2Config, Wav2Vec2Model

from mellow_ds.config.schema import DecoderConfig, EncoderConfig, ModelConfig
from mellow_ds.errors import ConfigError
from mellow_ds.model.assemble import build_layout, build_model, count_tokens_of_clip, load_tokenizer
from mellow_ds.model.tokenizer import train_tokenizer
from mellow_ds.prompt import Layout
from tests.model.conftest import TEXTS


@pytest.fixture
def decoder_folder(tmp_path, tokenizer):
    """A saved decoder 32 wide, with its tokenizer."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


def with_decoder(model_config, text_decoder):
    return replace(model_config, decoder=replace(model_config.decoder, text_decoder=text_decoder))


def test_the_same_seed_gives_the_same_model_whatever_was_drawn_before(model_config, data_config, tokenizer):
    first = build_model(model_config, data_config, tokenizer, seed=3).state_dict()
    torch.randn(10)
    second = build_model(model_config, data_config, tokenizer, seed=3).state_dict()
    other = build_model(model_config, data_config, tokenizer, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("encoder.net.fc1.weight", "projector.linear1.weight", "decoder.model.embed_tokens.weight"):
        assert not torch.equal(first[name], other[name])


def test_building_does_not_disturb_the_caller_s_random_numbers(model_config, data_config, tokenizer):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    build_model(model_config, data_config, tokenizer, seed=3)
    assert torch.equal(torch.randn(3), expected)


def test_pretrained_decoder_weights_are_kept(model_config, data_config, tokenizer, decoder_folder):
    model = build_model(with_decoder(model_config, decoder_folder), data_config, tokenizer, seed=0)
    saved = LlamaForCausalLM.from_pretrained(decoder_folder)
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.decoder.state_dict()[name], weight), name
    assert not torch.equal(model.encoder.net.fc1.weight, torch.zeros_like(model.encoder.net.fc1.weight))
    assert model.decoder.config._attn_implementation == "sdpa"


def test_parts_are_frozen_as_the_configuration_says(model_config, data_config, tokenizer):
    config = replace(
        model_config,
        encoder=EncoderConfig(d_proj=32),  # HTSAT, frozen by default
        decoder=replace(model_config.decoder, freeze_gpt_weights=True),
    )
    model = build_model(config, replace(data_config, sampling_rate=32_000), tokenizer, seed=0).train()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"projector"}
    assert not model.encoder.training
    assert not model.decoder.training
    assert model.num_audio_tokens == 33


def test_an_encoder_of_transformers_comes_with_its_weights(model_config, data_config, tokenizer, tmp_path):
    wav2vec2 = Wav2Vec2Model(
        Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=[4],
            conv_kernel=[10],
            conv_stride=[5],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )
    wav2vec2.save_pretrained(tmp_path)
    encoder = EncoderConfig(audioenc_name=str(tmp_path), out_emb=16, d_proj=32, audio_tokens=7)
    config = replace(model_config, encoder=encoder)
    data_config = replace(data_config, sampling_rate=16_000)
    assert count_tokens_of_clip(config, data_config) == 7
    model = build_model(config, data_config, tokenizer, seed=0)
    weight = wav2vec2.state_dict()["encoder.layers.0.feed_forward.output_dense.weight"]
    assert torch.equal(model.encoder.net.encoder.layers[0].feed_forward.output_dense.weight, weight)
    labels = torch.tensor([[-100] * 8 + [1, 0]])
    output = model(
        input_ids=torch.zeros(1, 10, dtype=torch.long),
        waveforms=torch.randn(1, 6400),
        clip_row=torch.tensor([0]),
        clip_start=torch.tensor([0]),
        clip_index=torch.tensor([0]),
        labels=labels,
    )
    assert torch.isfinite(output.loss)


def test_tokens_are_counted_without_building(model_config, data_config, model):
    assert count_tokens_of_clip(model_config, data_config) == model.num_audio_tokens == 1 + 21 // 2


def test_a_cnn14_takes_the_schema_s_default_for_what_it_gives(model_config, data_config):
    encoder = replace(model_config.encoder, audio_tokens=EncoderConfig.audio_tokens)
    assert count_tokens_of_clip(replace(model_config, encoder=encoder), data_config) == 11


def test_compact_and_mellow_layouts(model_config, data_config, tokenizer):
    compact = build_layout(model_config, data_config, tokenizer, 33)
    assert compact == Layout(audio_tokens=33, separator_id=0, end_id=0, max_prompt_tokens=16, max_answer_tokens=12)
    encoder = EncoderConfig(audio_tokens=129, d_proj=32)
    mellow_config = ModelConfig(encoder=encoder, decoder=model_config.decoder, layout="mellow")
    mellow = build_layout(mellow_config, data_config, tokenizer, 129)
    (mark,) = tokenizer("!")["input_ids"]
    assert (mellow.num_clips, mellow.prompt_pad_id, mellow.audio_tokens) == (2, mark, 129)
    assert mellow.prompt_suffix == tuple(tokenizer(" <|endoftext|>")["input_ids"])
    assert mellow.prompt_suffix[-1] == 0
    with pytest.raises(ConfigError, match=r"audio_tokens.*129"):
        build_layout(mellow_config, data_config, tokenizer, 33)


def test_a_from_config_decoder_reads_with_a_tokenizer_of_the_corpus(model_config, data_config, tmp_path):
    trained = load_tokenizer(model_config, data_config, lambda: TEXTS)
    assert trained.get_vocab() == train_tokenizer(TEXTS, 64).get_vocab()
    trained.save_pretrained(tmp_path)

    def never():
        raise AssertionError("the saved tokenizer should have been taken")

    assert load_tokenizer(model_config, data_config, never, saved=tmp_path).get_vocab() == trained.get_vocab()
    assert load_tokenizer(model_config, data_config, lambda: TEXTS, saved=tmp_path / "none yet") is not None
    with pytest.raises(ConfigError, match="from-config"):
        load_tokenizer(model_config, data_config, None)


def test_a_tokenizer_with_other_ids_than_the_decoder_s_is_refused(
    model_config, data_config, decoder_folder, tokenizer, tmp_path
):
    config = with_decoder(model_config, decoder_folder)
    assert load_tokenizer(config, data_config).get_vocab() == tokenizer.get_vocab()
    same = replace(data_config, tokenizer_type=decoder_folder)
    assert load_tokenizer(config, same).get_vocab() == tokenizer.get_vocab()
    train_tokenizer(["other words"], 64).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"tokenizer_type.*other.*text_decoder.*lm"):
        load_tokenizer(config, replace(data_config, tokenizer_type=str(tmp_path / "other")))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(model_config, data_config, decoder_folder):
    large = train_tokenizer([" ".join(f"word{i}" for i in range(100))], 100)
    with pytest.raises(ConfigError, match=r"ids up to 99.*lm.*64"):
        build_model(with_decoder(model_config, decoder_folder), data_config, large, seed=0)


def test_a_projector_of_another_width_than_the_decoder_is_refused(model_config, data_config, tokenizer, decoder_folder):
    config = with_decoder(model_config, decoder_folder)
    config = replace(config, encoder=replace(config.encoder, d_proj=48))
    with pytest.raises(ConfigError, match=r"d_proj is 48.*32 wide"):
        build_model(config, data_config, tokenizer, seed=0)


@pytest.mark.usefixtures("offline")
def test_an_encoder_that_is_not_there_is_named(model_config, data_config):
    config = replace(model_config, encoder=EncoderConfig(audioenc_name="no/such-encoder", d_proj=32))
    with pytest.raises(ConfigError, match=r"audioenc_name.*no/such-encoder"):
        count_tokens_of_clip(config, data_config)


@pytest.mark.usefixtures("offline")
def test_a_tokenizer_that_is_not_there_is_named(model_config, data_config):
    with pytest.raises(ConfigError, match=r"tokenizer_type.*no/such-tokenizer"):
        load_tokenizer(model_config, replace(data_config, tokenizer_type="no/such-tokenizer"), lambda: TEXTS)
    config = replace(model_config, decoder=DecoderConfig(text_decoder="no/such-decoder"))
    with pytest.raises(ConfigError, match=r"text_decoder.*no/such-decoder"):
        load_tokenizer(config, data_config)
