"""The causal language model: from a hub name, a local folder, a GGUF file, or made small from sizes."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mellow_ds.config.schema import DecoderConfig
from mellow_ds.errors import ConfigError

FROM_CONFIG = "from-config"
_KEY = "model.decoder.text_decoder"
_MAX_POSITIONS = 8192  # of a decoder made from sizes; rotary positions cost nothing

# configuration fields by which architectures change logits after the head, and the values that change nothing
_AFTER_HEAD = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}


def check_plain_head(config: PretrainedConfig) -> None:
    """Refuse decoders that scale or cap logits after the head, which here runs on answer positions by itself."""
    for name, neutral in _AFTER_HEAD.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ConfigError(
                f"{_KEY}: decoders of type '{config.model_type}' change logits after the head ({name} is {value}), "
                "which is not supported: choose another decoder"
            )


def is_gguf(text_decoder: str) -> bool:
    """Whether the name is that of a GGUF file."""
    return text_decoder.lower().endswith(".gguf")


def config_from_sizes(sizes: DecoderConfig, vocab_size: int, end_id: int) -> LlamaConfig:
    """A small Llama of the given sizes, embeddings tied to the head."""
    if sizes.hidden_size % sizes.num_attention_heads:
        raise ConfigError(
            f"model.decoder.hidden_size is {sizes.hidden_size}, which {sizes.num_attention_heads} attention heads "
            "do not divide: change model.decoder.num_attention_heads"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_attention_heads,
        max_position_embeddings=_MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=None,
    )


def load_decoder(text_decoder: str) -> PreTrainedModel:
    """The pretrained causal LM that `text_decoder` names, float32, on the CPU."""
    if is_gguf(text_decoder):
        return _load_gguf(_existing_file(text_decoder))
    try:
        model = AutoModelForCausalLM.from_pretrained(text_decoder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load(text_decoder, error)) from error
    model.config.dtype, model.config.name_or_path = None, ""  # facts of the file, not of the architecture
    _check_head_by_running(model, text_decoder)
    return model


def load_decoder_config(text_decoder: str) -> PretrainedConfig:
    """The configuration of the causal LM that `text_decoder` names, without its weights."""
    try:
        if is_gguf(text_decoder):
            file = _existing_file(text_decoder)
            return _plain(AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name))
        return _plain(AutoConfig.from_pretrained(text_decoder))
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load(text_decoder, error)) from error


def load_decoder_tokenizer(text_decoder: str) -> Any:
    """The tokenizer that comes with the decoder."""
    return load_named_tokenizer(text_decoder, _KEY)


def load_named_tokenizer(name: str, key: str) -> Any:
    """The tokenizer in a hub repository, local folder or GGUF file; `key` is named when there is none."""
    try:
        if is_gguf(name):
            file = _existing_file(name)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: no tokenizer could be loaded from '{name}' ({_first_line(error)}): name a local folder or a GGUF "
            "file, or fill the hub's cache (HF_HOME) where there is a network"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # what transformers makes of a folder with a GPT-2 configuration and no tokenizer files
        raise ConfigError(f"{key}: there is no tokenizer in '{name}'")
    return tokenizer


def _load_gguf(file: Path) -> PreTrainedModel:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise ConfigError(
            f"{_KEY}: reading the GGUF file {file} needs the packages gguf and accelerate: "
            "install mellow-ds with the extra 'gguf'"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load(str(file), error)) from error
    # what comes out counts as quantized and refuses to be saved, though its weights are plain float32 by now
    with no_init_weights():  # drawing 135 million numbers to overwrite them takes 4 s
        model = AutoModelForCausalLM.from_config(_plain(loaded.config), dtype=torch.float32)
    model.tie_weights()
    model.load_state_dict(loaded.state_dict())
    return model


@torch.no_grad()
def _check_head_by_running(model: PreTrainedModel, name: str) -> None:
    """Compare the decoder's own logits with its head on its last hidden states, which is what the loss is made of."""
    ids = torch.arange(8).unsqueeze(0) % model.config.get_text_config().vocab_size
    model.eval()
    head = model.get_output_embeddings()
    same = False
    if head is not None and model.base_model is not model:
        own = head(model.base_model(input_ids=ids).last_hidden_state)
        same = torch.allclose(model(input_ids=ids).logits, own, rtol=1e-3, atol=1e-3)
    if not same:
        raise ConfigError(
            f"{_KEY}: '{name}' (type '{model.config.model_type}') does more to its logits than its head does, "
            "which is not supported: choose another decoder"
        )


def _plain(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture, with nothing of the file it came from: number format, quantization and path."""
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("quantization_config", "dtype", "torch_dtype", "_name_or_path", "architectures")
    }
    return AutoConfig.for_model(**fields)


def _existing_file(name: str) -> Path:
    file = Path(name)
    if not file.is_file():
        raise ConfigError(f"{_KEY}: the file {name} is not there")
    return file.resolve()


def _cannot_load(name: str, error: Exception) -> str:
    return (
        f"{_KEY}: no causal language model could be loaded from '{name}' ({_first_line(error)}): "
        "name a hub model, a folder, a GGUF file, or 'from-config'"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
