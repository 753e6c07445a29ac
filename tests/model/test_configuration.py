"""A configuration written to a folder is the same when read, decoder included, without asking a hub."""

from transformers import GPT2Config, LlamaConfig

from mellow_ds.model.configuration import MellowConfig, MellowEncoderConfig


def test_a_saved_configuration_is_read_back_equal(tmp_path):
    text = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_theta=12345.0, tie_word_embeddings=True)
    encoder = MellowEncoderConfig(kind="Cnn14", channels=(4, 8), out_emb=8, clip_samples=123, audio_tokens=0)
    config = MellowConfig(encoder_config=encoder, text_config=text, projector_dropout=0.25, end_token_id=7)
    config.save_pretrained(tmp_path)
    read = MellowConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict()
    assert isinstance(read.text_config, LlamaConfig)
    assert read.text_config.rope_parameters["rope_theta"] == 12345.0
    assert read.text_config.tie_word_embeddings
    assert (read.encoder_config.channels, read.encoder_config.clip_samples, read.end_token_id) == ([4, 8], 123, 7)


def test_generation_finds_the_decoder_s_configuration():
    config = MellowConfig(text_config=GPT2Config(n_embd=24, n_head=2))
    assert config.get_text_config(decoder=True) is config.text_config
    assert config.text_config.hidden_size == 24


def test_a_decoder_s_way_of_attending_survives_being_put_into_a_configuration():
    text = LlamaConfig()
    text._attn_implementation = "sdpa"
    assert MellowConfig(text_config=text).text_config._attn_implementation == "sdpa"
