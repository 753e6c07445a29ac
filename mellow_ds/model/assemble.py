"""From the run configuration to tokenizer, layout and model; parts that do not fit together are refused."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mellow_ds.config.schema import DataConfig, ModelConfig
from mellow_ds.config.train_keys import PARTS
from mellow_ds.errors import ConfigError
from mellow_ds.model.configuration import (
    CNN14,
    HTSAT,
    HTSAT_REPEATED_TOKENS,
    WAVEFORM,
    MellowConfig,
    MellowEncoderConfig,
)
from mellow_ds.model.decoder import (
    FROM_CONFIG,
    config_from_sizes,
    load_decoder,
    load_decoder_config,
    load_decoder_tokenizer,
    load_named_tokenizer,
)
from mellow_ds.model.encoders import (
    WaveformEncoder,
    build_encoder,
    check_encoder,
    count_audio_tokens,
    load_waveform_weights,
)
from mellow_ds.model.lora import draw_adapters, lora_fields
from mellow_ds.model.meta import parameters_on_meta
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.published import load_pretrained_encoder
from mellow_ds.model.tokenizer import END_OF_TEXT, train_tokenizer
from mellow_ds.prompt import Layout

_MELLOW_NUM_CLIPS = 2
_DEFAULT_AUDIO_TOKENS = 33  # the schema's default, meant for HTSAT


def load_tokenizer(
    model_config: ModelConfig,
    data_config: DataConfig,
    texts: Callable[[], Iterable[str]] | None = None,
    saved: Path | None = None,
) -> Any:
    """The run's tokenizer: `saved` (a folder of this run) where it is there, else data.tokenizer_type, else the
    decoder's own; for a from-config decoder one trained on `texts()`. Raises `ConfigError` where there is none."""
    if saved is not None and (saved / "tokenizer_config.json").is_file():
        return load_named_tokenizer(str(saved), "saved tokenizer")
    named, decoder = data_config.tokenizer_type, model_config.decoder.text_decoder
    if decoder == FROM_CONFIG:
        if named:
            return load_named_tokenizer(named, "data.tokenizer_type")
        if texts is None:
            raise ConfigError(
                "model.decoder.text_decoder is from-config, but there are no texts to train a tokenizer on"
            )
        return train_tokenizer(texts(), model_config.decoder.vocab_size)
    if not named or named == decoder:
        return load_decoder_tokenizer(decoder)
    chosen = load_named_tokenizer(named, "data.tokenizer_type")
    try:
        own = load_decoder_tokenizer(decoder)
    except ConfigError:
        return chosen  # a decoder without a tokenizer of its own, which is what data.tokenizer_type is for
    if chosen.get_vocab() != own.get_vocab():
        raise ConfigError(
            f"data.tokenizer_type '{named}' gives other ids than the tokenizer of model.decoder.text_decoder "
            f"'{decoder}': leave data.tokenizer_type empty"
        )
    return chosen


def end_token_id(tokenizer: Any) -> int:
    """The id that ends an answer and separates clips: end-of-text (0 for SmolLM2, 50256 for GPT-2)."""
    found = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if found is None:
        raise ConfigError(f"the tokenizer '{tokenizer.name_or_path}' has no end-of-text token: choose another")
    return int(found)


def build_layout(model_config: ModelConfig, data_config: DataConfig, tokenizer: Any, num_audio_tokens: int) -> Layout:
    """How clips, prompt and answer stand in a row: compact, or as Mellow's published weights expect."""
    end_id = end_token_id(tokenizer)
    common: dict[str, Any] = {
        "audio_tokens": num_audio_tokens,
        "separator_id": end_id,
        "end_id": end_id,
        "max_prompt_tokens": data_config.ip_text_len,
        "max_answer_tokens": data_config.op_text_len,
    }
    if model_config.layout == "compact":
        return Layout(**common)
    if model_config.encoder.audioenc_name == HTSAT and num_audio_tokens != HTSAT_REPEATED_TOKENS:
        raise ConfigError(
            f"model.layout is mellow, but model.encoder.audio_tokens makes {num_audio_tokens} tokens of a clip: "
            f"set it to {HTSAT_REPEATED_TOKENS}"
        )
    suffix = tokenizer(f" {END_OF_TEXT}", add_special_tokens=False)["input_ids"]
    pad = tokenizer("!", add_special_tokens=False)["input_ids"]
    if len(pad) != 1:
        raise ConfigError("model.layout is mellow, which pads with the token '!', but the tokenizer has no such token")
    return Layout(**common, num_clips=_MELLOW_NUM_CLIPS, prompt_suffix=tuple(suffix), prompt_pad_id=pad[0])


def build_encoder_config(model_config: ModelConfig, data_config: DataConfig) -> MellowEncoderConfig:
    """The encoder's configuration, checked; reads the hub only for an encoder of transformers."""
    encoder = model_config.encoder
    kind = encoder.audioenc_name if encoder.audioenc_name in (HTSAT, CNN14) else WAVEFORM
    trunk = _load_trunk_config(encoder.audioenc_name) if kind == WAVEFORM else {}
    # only HTSAT has a choice between 33 and 129; the schema's default stands for "what the encoder gives" elsewhere
    takes_default = kind == CNN14 and encoder.audio_tokens == _DEFAULT_AUDIO_TOKENS
    config = MellowEncoderConfig(
        kind=kind,
        sampling_rate=data_config.sampling_rate,
        clip_samples=data_config.clip_samples,
        window_size=encoder.window_size,
        hop_size=encoder.hop_size,
        mel_bins=encoder.mel_bins,
        fmin=encoder.fmin,
        fmax=encoder.fmax,
        num_classes=encoder.num_classes,
        out_emb=encoder.out_emb,
        channels=encoder.channels,
        dropout=encoder.dropout,
        audio_tokens=0 if takes_default else encoder.audio_tokens,
        trunk=trunk,
    )
    check_encoder(config)
    return config


def count_tokens_of_clip(model_config: ModelConfig, data_config: DataConfig) -> int:
    """Audio tokens of a clip, without building a model."""
    return count_audio_tokens(build_encoder_config(model_config, data_config))


def build_model(
    model_config: ModelConfig,
    data_config: DataConfig,
    tokenizer: Any,
    seed: int,
    load_pretrained: bool = True,
    on_meta: bool = False,
) -> MellowForConditionalGeneration:
    """The model that a run starts from: float32, on the CPU, the same for the same seed; pretrained parts loaded,
    frozen parts frozen. Raises `ConfigError` where parts do not fit.

    `load_pretrained` false: for one whose weights will all come from a step folder. Of SmolLM2-135M in a GGUF file the
    sizes take 7 s of CPU to read and the weights 20 more. `on_meta`: the decoder's parameters are on the meta device,
    its buffers and adapters real; `DecoderWeights` or a step folder gives the rest. A decoder made from sizes
    that is to be drawn here (`load_pretrained`) is made real all the same: it is small.
    """
    encoder = model_config.encoder
    text_decoder = model_config.decoder.text_decoder
    on_meta = on_meta and not (load_pretrained and text_decoder == FROM_CONFIG)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = None
        if on_meta:
            decoder = _decoder_on_meta(model_config, data_config, tokenizer)
        elif load_pretrained and text_decoder != FROM_CONFIG:
            decoder = load_decoder(text_decoder)
        config = build_config(model_config, data_config, tokenizer, None if decoder is None else decoder.config)
        model = MellowForConditionalGeneration(config, decoder=decoder).float()
    if load_pretrained and encoder.use_pretrained_audioencoder:
        load_pretrained_encoder(model.encoder, encoder.pretrained_audioencoder_path)
    elif load_pretrained and config.encoder_config.kind == WAVEFORM:
        load_waveform_weights(model.encoder, encoder.audioenc_name)
    draw_adapters(model.decoder, seed)
    model.set_trainable(unfrozen_parts(model_config))
    return model


def _decoder_on_meta(model_config: ModelConfig, data_config: DataConfig, tokenizer: Any) -> PreTrainedModel:
    text_config = build_config(model_config, data_config, tokenizer).text_config
    with parameters_on_meta():
        decoder: PreTrainedModel = AutoModelForCausalLM.from_config(text_config, dtype=torch.float32)
    return decoder


def unfrozen_parts(model_config: ModelConfig) -> tuple[str, ...]:
    """The parts that the freeze keys leave to be trained, of `PARTS`."""
    frozen = {
        "encoder": model_config.encoder.freeze_audio_encoder_weights,
        "projector": model_config.encoder.freeze_projector_weights,
        "decoder": model_config.decoder.freeze_gpt_weights,
    }
    return tuple(part for part in PARTS if not frozen[part])


def build_pretrained_encoder(
    model_config: ModelConfig, data_config: DataConfig
) -> tuple[torch.nn.Module, MellowEncoderConfig, str]:
    """(encoder with pretrained weights in eval mode, its configuration, kind and origin of the weights).

    Raises `ConfigError` where the configuration names no weights.
    """
    config = build_encoder_config(model_config, data_config)
    encoder = build_encoder(config)
    named = model_config.encoder
    if named.use_pretrained_audioencoder:
        load_pretrained_encoder(encoder, named.pretrained_audioencoder_path)
        origin = named.pretrained_audioencoder_path
    elif isinstance(encoder, WaveformEncoder):
        load_waveform_weights(encoder, named.audioenc_name)
        origin = named.audioenc_name
    else:
        raise ConfigError(
            "the configuration names no weights of the encoder, and features of an untrained one are noise: set "
            "model.encoder.use_pretrained_audioencoder and pretrained_audioencoder_path, or give --checkpoint"
        )
    return encoder.eval(), config, f"{config.kind} of {Path(origin).name}"


def build_config(
    model_config: ModelConfig, data_config: DataConfig, tokenizer: Any, text_config: PretrainedConfig | None = None
) -> MellowConfig:
    """The model's configuration, its parts checked against each other.

    `text_config`: that of a decoder which is loaded already. `tokenizer` may be None for a decoder that has one
    elsewhere: its own end-of-text id is taken then.
    """
    if text_config is None:
        if model_config.decoder.text_decoder == FROM_CONFIG:
            text_config = config_from_sizes(model_config.decoder, len(tokenizer), end_token_id(tokenizer))
        else:
            text_config = load_decoder_config(model_config.decoder.text_decoder)
    _check_fit(model_config, data_config, tokenizer, text_config)
    end_id = (getattr(text_config, "eos_token_id", 0) or 0) if tokenizer is None else end_token_id(tokenizer)
    return MellowConfig(
        encoder_config=build_encoder_config(model_config, data_config),
        text_config=text_config,
        projector_dropout=model_config.encoder.projector_dropout,
        end_token_id=end_id,
        lora=lora_fields(model_config.decoder.lora),
    )


def _check_fit(model_config: ModelConfig, data_config: DataConfig, tokenizer: Any, text_config: Any) -> None:
    decoder, d_proj = model_config.decoder.text_decoder, model_config.encoder.d_proj
    if text_config.hidden_size != d_proj:
        raise ConfigError(
            f"model.encoder.d_proj is {d_proj}, but the decoder '{decoder}' is {text_config.hidden_size} wide: "
            "make them equal"
        )
    if model_config.decoder.lora.rank and model_config.decoder.freeze_gpt_weights:
        raise ConfigError(
            "model.decoder.freeze_gpt_weights is true, which would freeze the adapters of model.decoder.lora too: set "
            "it to false (with adapters the decoder's own weights stay as they are anyway)"
        )
    if tokenizer is None:
        return
    highest = max(tokenizer.get_vocab().values())
    if highest >= text_config.vocab_size:
        raise ConfigError(
            f"the tokenizer '{data_config.tokenizer_type or tokenizer.name_or_path}' has ids up to {highest}, but the "
            f"decoder '{decoder}' has embeddings for {text_config.vocab_size}: they do not belong together; "
            "leave data.tokenizer_type empty, or name the decoder's own"
        )


def _load_trunk_config(name: str) -> dict[str, Any]:
    try:
        return AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.encoder.audioenc_name: no encoder could be loaded from '{name}' ({reason}): "
            "use HTSAT, Cnn14, or a hub name or folder of transformers"
        ) from error
