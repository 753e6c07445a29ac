"""What autograd keeps between forward and backward, counted by passes on the meta device: no memory, no arithmetic.

Every tensor that an operation saves for its backward pass is counted once, weights left out. It grows linearly with the
tokens of a micro-batch, as attention is counted the way fused kernels do it: queries, keys, values and output of every
head, no score matrix. Dropped by activation checkpointing: all of a layer but its input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from mellow_ds.doctor.facts import ActivationFacts
from mellow_ds.model.modeling import MellowForConditionalGeneration

_ROWS, _TOKENS, _CLIPS = 2, 64, 2  # of the passes; what is counted is divided by them
_ATTENTION = "doctor_fused"
_GENERIC_LAYER = 17  # numbers a token and unit of width that a layer keeps (Korthikanti et al. 2022: 34 bytes in half)


def count_activations(
    model: MellowForConditionalGeneration, dtype: torch.dtype, trains_encoder: bool
) -> ActivationFacts:
    """Of a `model` on the meta device, in number format `dtype`; changes the model."""
    nn.Module.to(model, dtype)  # that of transformers is typed for another call
    width = model.config.text_config.hidden_size
    encoder, projector = _audio_bytes(model, trains_encoder)
    layer, base = _decoder_bytes(model.config.text_config, dtype)
    return ActivationFacts(
        layer_token_bytes=layer,
        block_token_bytes=width * dtype.itemsize,
        base_token_bytes=base,
        projector_clip_bytes=projector,
        encoder_clip_bytes=encoder,
        answer_token_bytes=_logits_bytes(model.config.text_config.vocab_size, dtype),
    )


def _logits_bytes(vocab_size: int, dtype: torch.dtype) -> float:
    """Of an answer token: logits, their float32 copy where they are in half precision, log-softmax, gradients."""
    number = dtype.itemsize
    return vocab_size * (12 if number == 4 else 2 * number + 12)


def _audio_bytes(model: MellowForConditionalGeneration, trains_encoder: bool) -> tuple[float, float]:
    """(encoder, projector) a clip."""
    encoder, settings = cast(Any, model.encoder), model.config.encoder_config
    waveforms = torch.empty(_CLIPS, settings.clip_samples, device="meta")
    if hasattr(encoder, "log_mel"):
        # the front end runs without a graph, and its filter bank is not on the meta device
        frames, bands = encoder.log_mel.num_frames(settings.clip_samples), settings.mel_bins
        encoder.log_mel = lambda given: given.new_empty(len(given), 1, frames, bands)
    model.train().requires_grad_(True)
    with _counted(model) as saved:
        features = encoder(waveforms)
    encoder_bytes = _total(saved) / _CLIPS if trains_encoder else 0.0
    given = {
        name: tensor.detach().requires_grad_(trains_encoder) for name, tensor in features.items() if tensor is not None
    }
    with _counted(model) as saved:
        model.projector(given)
    return encoder_bytes, _total(saved) / _CLIPS


def _decoder_bytes(config: PretrainedConfig, dtype: torch.dtype) -> tuple[float, float]:
    """(one layer, all outside layers) a token, from decoders of one and of two layers."""
    try:
        one, two = (_shallow_decoder_bytes(config, layers, dtype) for layers in (1, 2))
    except Exception:  # an architecture that cannot be made shallow or shapeless: one of hundreds, each in its own way
        return _GENERIC_LAYER * config.hidden_size * dtype.itemsize, 3.0 * config.hidden_size * dtype.itemsize
    return two - one, max(2 * one - two, 0.0)


def _shallow_decoder_bytes(config: PretrainedConfig, num_layers: int, dtype: torch.dtype) -> float:
    fields = {**config.to_dict(), "num_hidden_layers": num_layers, "use_cache": False}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:num_layers]
    if "n_layer" in fields:
        fields["n_layer"] = num_layers
    shallow = type(config)(**fields)
    AttentionInterface.register(_ATTENTION, _fused_attention)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(shallow, attn_implementation=_ATTENTION).to(dtype).train()
        embeds = torch.empty(_ROWS, _TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
        # a mask of four dimensions is taken as it is; any other would have its values looked at
        mask = torch.empty(_ROWS, 1, _TOKENS, _TOKENS, dtype=torch.bool)
        with _counted(decoder) as saved:
            decoder.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    return _total(saved) / (_ROWS * _TOKENS)


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[torch.UntypedStorage]]:
    """The storages that operations save for their backward pass meanwhile, each once, weights and buffers left out."""
    own = {_identity(tensor) for tensor in (*module.parameters(), *module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        identity = _identity(tensor)
        if identity not in own:
            saved[identity] = tensor.untyped_storage()
        return tensor

    found: list[torch.UntypedStorage] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    found.extend(saved.values())


def _identity(tensor: torch.Tensor) -> int:
    """Of the storage; tensors of the meta device have no address."""
    return int(tensor.untyped_storage()._cdata)


def _total(storages: list[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values, output, and a float32 number a query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("only counted, never run")


def _fused_attention(
    module: nn.Module,  # noqa: ARG001 (the interface's)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[B, H, T, d] each, keys and values with fewer heads where heads share them: repeated, as for masked batches."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    apply = cast(Callable[..., torch.Tensor], _FusedAttention.apply)
    return apply(query, key, value).transpose(1, 2).contiguous(), None
