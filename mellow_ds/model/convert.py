"""A checkpoint of the original Mellow made into a model folder of this project."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import torch

from mellow_ds.config.schema import DataConfig, EncoderConfig, ModelConfig
from mellow_ds.errors import CheckpointError, ConfigError
from mellow_ds.model.assemble import build_config, build_layout, load_tokenizer
from mellow_ds.model.configuration import CNN14, HTSAT, HTSAT_REPEATED_TOKENS
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.processing import build_processor
from mellow_ds.model.published import Tensors, drop_computed, load_exactly, read_checkpoint, rename_encoder

_ENCODERS = {"audio_encoder.base.htsat.": HTSAT, "audio_encoder.base.cnn14.": CNN14}

_log = logging.getLogger(__name__)


def convert_mellow(checkpoint: Path, out: Path, model_config: ModelConfig, data_config: DataConfig) -> Path:
    """Write the original's checkpoint as a model folder (weights, tokenizer, processor) in Mellow's layout.

    Kind and sizes of encoder and projector come from the checkpoint; `model_config` says which decoder and tokenizer
    belong to it. Without a tokenizer no processor is written beside the model. Returns `out`. Raises `CheckpointError`
    where names or shapes are not those of a Mellow model.
    """
    tensors = read_checkpoint(checkpoint)
    model_config = _config_of(tensors, model_config, checkpoint)
    tokenizer = _tokenizer_if_any(model_config, data_config)
    model = MellowForConditionalGeneration(build_config(model_config, data_config, tokenizer))
    load_exactly(model, _tied(_from_mellow(tensors), model, checkpoint), checkpoint)
    model.eval()
    model.save_pretrained(out)
    if tokenizer is not None:
        layout = build_layout(model_config, data_config, tokenizer, model.num_audio_tokens)
        build_processor(model, tokenizer, layout).save_pretrained(out)
    _log.info("converted %s to %s", checkpoint, out)
    return out


def _tokenizer_if_any(model_config: ModelConfig, data_config: DataConfig) -> Any:
    """The decoder's tokenizer; None, said aloud, for a decoder folder that has a configuration and nothing else."""
    try:
        return load_tokenizer(model_config, data_config)
    except ConfigError as error:
        if data_config.tokenizer_type:
            raise
        _log.warning("%s: the model is written without a processor; name data.tokenizer_type to have one", error)
        return None


def _from_mellow(tensors: Tensors) -> dict[str, torch.Tensor]:
    """All names of a Mellow checkpoint -> names of `MellowForConditionalGeneration`."""
    renamed: dict[str, torch.Tensor] = {}
    encoder: dict[str, torch.Tensor] = {}
    kind = HTSAT
    for name, tensor in drop_computed(tensors).items():
        prefix = next((prefix for prefix in _ENCODERS if name.startswith(prefix)), None)
        if prefix is not None:
            kind = _ENCODERS[prefix]
            encoder[name.removeprefix(prefix)] = tensor
            continue
        name = re.sub(r"^audio_encoder\.base\.c2l\.", "projector.c2l.", name)
        name = re.sub(r"^audio_encoder\.projection\.", "projector.", name)
        renamed[re.sub(r"^caption_decoder\.lm\.", "decoder.", name)] = tensor
    renamed.update({f"encoder.net.{name}": tensor for name, tensor in rename_encoder(kind, encoder).items()})
    return renamed


def _tied(tensors: Tensors, model: MellowForConditionalGeneration, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The decoder's embeddings for its head too, where they are one; the file holds them twice."""
    tied = dict(tensors)
    for head, embeddings in model.all_tied_weights_keys.items():
        if embeddings not in tied:
            continue
        if head in tied and not torch.equal(tied[head], tied[embeddings]):
            _log.warning(
                "%s: %s differs from %s, which it is tied to; the latter is taken", checkpoint, head, embeddings
            )
        tied[head] = tied[embeddings]
    return tied


def _config_of(tensors: Tensors, model_config: ModelConfig, checkpoint: Path) -> ModelConfig:
    """`model_config` with the kind and sizes of the checkpoint's encoder and projector."""
    kinds = {kind for prefix, kind in _ENCODERS.items() if any(name.startswith(prefix) for name in tensors)}
    c2l = tensors.get("audio_encoder.base.c2l.weight")
    linear = tensors.get("audio_encoder.projection.linear1.weight")
    if len(kinds) != 1 or c2l is None or linear is None:
        raise CheckpointError(
            f"{checkpoint} is not a Mellow checkpoint: it has no audio_encoder.base.htsat or .cnn14, c2l and projection"
        )
    (kind,) = kinds
    encoder = dataclasses.replace(
        model_config.encoder,
        audioenc_name=kind,
        audio_tokens=HTSAT_REPEATED_TOKENS if kind == HTSAT else 0,
        channels=EncoderConfig.channels,
        num_classes=c2l.shape[1],
        out_emb=c2l.shape[0],
        d_proj=linear.shape[0],
        use_pretrained_audioencoder=False,
        pretrained_audioencoder_path="",
    )
    return dataclasses.replace(model_config, encoder=encoder, layout="mellow")
