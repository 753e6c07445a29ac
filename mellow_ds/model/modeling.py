"""The model: encoder, projector and decoder put together; loss on answer tokens, and generation with a cache."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.clap.modeling_clap import ClapAudioSelfAttention
from transformers.utils import ModelOutput

from mellow_ds.config.train_keys import PARTS
from mellow_ds.data.batch import IGNORE_INDEX
from mellow_ds.errors import ConfigError, MellowError
from mellow_ds.model.configuration import MellowConfig
from mellow_ds.model.decoder import check_plain_head
from mellow_ds.model.encoders import AudioFeatures, as_floats, build_encoder, count_audio_tokens
from mellow_ds.model.lora import add_adapters, is_adapter
from mellow_ds.model.norm import paused
from mellow_ds.model.projector import MellowProjector

_MAX_NEW_TOKENS = 64  # default length of an answer; transformers' own default of 20 would cut descriptions


@dataclass
class MellowOutput(ModelOutput):
    """What `forward` gives."""

    loss: torch.Tensor | None = None
    """[] float32, mean over the answer tokens of this batch (0 where there are none); with labels."""
    loss_sum: torch.Tensor | None = None
    """[] float32, sum over the answer tokens of this batch; with labels."""
    num_answer_tokens: torch.Tensor | None = None
    """[] int64; with labels."""
    row_losses: torch.Tensor | None = None
    """[B] float32 without a graph, sum over each row's answer tokens; with labels."""
    logits: torch.Tensor | None = None
    """With labels [N, V], one row an answer token in row order; without [B, T, V]."""
    past_key_values: Cache | None = None
    """The decoder's cache, where it was asked for."""
    inputs_embeds: torch.Tensor | None = None
    """[B, T, D], what the decoder would read; alone, with `embeds_only`."""


class MellowForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """One, two or more clips and a prompt in, text out.

    `encoder` makes features of waveforms, `projector` makes tokens of features, `decoder` is a causal language model of
    transformers. Each of the three can be frozen as a whole, and freed again.
    """

    config_class = MellowConfig
    base_model_prefix = "mellow"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # the decoder decides what of these it can do; saying no here would force plain attention on it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _trained_parts: frozenset[str]

    def __init__(self, config: MellowConfig, decoder: PreTrainedModel | None = None) -> None:
        """`decoder`: a causal LM that has its weights already, of `config.text_config`; by default a new one."""
        super().__init__(config)
        check_plain_head(config.text_config)
        self.encoder = build_encoder(config.encoder_config)
        self.projector = MellowProjector(
            config.encoder_config, config.text_config.hidden_size, config.projector_dropout
        )
        self.decoder = AutoModelForCausalLM.from_config(config.text_config) if decoder is None else decoder
        if decoder is not None:
            for module in decoder.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # keeps post_init from drawing its weights anew
        self.generation_config = GenerationConfig(
            eos_token_id=config.end_token_id, pad_token_id=config.end_token_id, max_new_tokens=_MAX_NEW_TOKENS
        )
        self._trained_parts = frozenset(PARTS)
        self.post_init()
        if config.lora:
            add_adapters(self.decoder, config.lora)  # after post_init, which would draw B too

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def num_audio_tokens(self) -> int:
        """Tokens of one clip of the configured length."""
        return count_audio_tokens(self.config.encoder_config)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embeddings."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's head."""
        return self.decoder.get_output_embeddings()

    @property
    def trained_parts(self) -> frozenset[str]:
        """The parts that are not frozen, of `PARTS`."""
        return self._trained_parts

    def set_trainable(self, parts: Collection[str]) -> None:
        """Train these of `PARTS` and freeze the others; may be called again at any step of a run. A decoder with
        adapters is its adapters: its own weights stay frozen.

        Frozen: no gradients, and eval mode whatever `train()` says. A frozen part still passes gradients through to the
        parts before it. Raises `ConfigError` for a name that is no part.
        """
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise ConfigError(f"the model has no part '{unknown[0]}'; its parts are {', '.join(PARTS)}")
        self._trained_parts = frozenset(parts)
        for name, parameter in self.named_parameters():
            part = name.partition(".")[0]
            fixed = part == "decoder" and self.config.lora is not None and not is_adapter(name)
            parameter.requires_grad_(part in self._trained_parts and not fixed)
        self.train(self.training)

    def train(self, mode: bool = True) -> "MellowForConditionalGeneration":
        """As for any module, but frozen parts stay in eval mode: no dropout, no drift of BatchNorm statistics."""
        super().train(mode)
        for part in PARTS:
            if part not in self._trained_parts:
                self.get_submodule(part).eval()
        return self

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "MellowForConditionalGeneration":
        """Casts and moves; what modules have computed for themselves moves, but keeps its number format.

        Rotary frequencies rounded to bfloat16 (base 100,000, heads of 64) turn up to 0.4 radians too far at position
        300; transformers keeps them in float32 when it loads a model, DeepSpeed's cast of a whole model would not.
        """
        computed = [
            (module, name, buffer)
            for module in self.modules()
            for name in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(name)) is not None and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, before in computed:
            after = module._buffers[name]
            if after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # encoder and projector only: the decoder and a waveform encoder draw their own weights
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)  # as PANNs
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ClapAudioSelfAttention):
            init.zeros_(module.relative_position_bias_table)
            init.copy_(module.relative_position_index, module.create_relative_position_index())
        else:
            super()._init_weights(module)

    # -- audio ---------------------------------------------------------------------------------------------------------

    def encode(self, waveforms: torch.Tensor) -> AudioFeatures:
        """[C, S] int16, or floats in -1 .. 1 -> the encoder's features; without a graph where it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "encoder" in self._trained_parts):
            return self.encoder(as_floats(waveforms))

    def embed(
        self,
        input_ids: torch.Tensor | None,
        waveforms: torch.Tensor | None = None,
        clip_row: torch.Tensor | None = None,
        clip_start: torch.Tensor | None = None,
        clip_index: torch.Tensor | None = None,
        audio_features: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Token embeddings [B, T, D] with each placement's audio tokens in their place (see `mellow_ds.data.batch`)."""
        if input_ids is None:
            raise MellowError("neither input_ids nor inputs_embeds given")
        embeds = self.get_input_embeddings()(input_ids)
        if audio_features is None:
            if waveforms is None:
                return embeds
            audio_features = self.encode(waveforms)
        if clip_row is None or clip_start is None or clip_index is None:
            raise MellowError("clips without clip_row, clip_start and clip_index: say where their tokens go")
        tokens = self.projector(_as_numbers_of(self.projector, audio_features))  # [C, A, D]
        if tokens.shape[1] != self.num_audio_tokens:
            # the row has room for num_audio_tokens; more would run over the prompt without a word
            raise MellowError(
                f"clips gave {tokens.shape[1]} tokens, but rows are laid out for {self.num_audio_tokens}: "
                f"give waveforms of {self.config.encoder_config.clip_samples} samples"
            )
        columns = clip_start[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        return embeds.index_put((clip_row[:, None], columns), tokens[clip_index].to(embeds.dtype))

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        waveforms: torch.Tensor | None = None,
        clip_row: torch.Tensor | None = None,
        clip_start: torch.Tensor | None = None,
        clip_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        audio_features: Mapping[str, torch.Tensor] | None = None,
        logits_to_keep: int = 0,
        embeds_only: bool = False,
        **decoder_kwargs: Any,
    ) -> MellowOutput:
        """Run a batch (shapes as in `mellow_ds.data.batch.Batch`).

        With `labels` the head runs on the positions that predict an answer token only, and the loss is in float32.
        `audio_features`, what `encode` gives (any floating-point format), stands in for `waveforms`. Without `labels`,
        `logits_to_keep` last positions get logits; 0: all. `embeds_only`: stop before the decoder.
        """
        decoder_kwargs.pop("return_dict", None)
        if labels is not None:
            decoder_kwargs["use_cache"] = False
        if inputs_embeds is None:
            waveforms, counts = self._stand_in(waveforms, labels)
            with paused(self.encoder, not counts):
                inputs_embeds = self.embed(input_ids, waveforms, clip_row, clip_start, clip_index, audio_features)
        if embeds_only:
            return MellowOutput(inputs_embeds=inputs_embeds)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = _never_empty(attention_mask)
            if position_ids is None:
                position_ids = _positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        output = self.decoder.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **decoder_kwargs,
        )
        if labels is not None:
            return self._answer_loss(output.last_hidden_state, labels)
        logits = self.get_output_embeddings()(output.last_hidden_state[:, -logits_to_keep:])
        return MellowOutput(logits=logits, past_key_values=output.get("past_key_values"))

    def _answer_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> MellowOutput:
        """hidden [B, T, D], labels [B, T] -> loss of the N answer tokens, each predicted one position before."""
        targets = labels[:, 1:]
        counted = targets != IGNORE_INDEX
        logits = self.get_output_embeddings()(hidden[:, :-1][counted])
        # the sum over no tokens is 0 with a graph through all weights: ranks without examples keep step with the others
        losses = functional.cross_entropy(logits.float(), targets[counted], reduction="none")  # [N]
        loss_sum = losses.sum()
        row_losses = loss_sum.new_zeros(len(targets)).index_add_(0, counted.nonzero()[:, 0], losses.detach())
        num_answer_tokens = counted.sum()
        return MellowOutput(
            loss=loss_sum / num_answer_tokens.clamp(min=1),
            loss_sum=loss_sum,
            num_answer_tokens=num_answer_tokens,
            row_losses=row_losses,
            logits=logits,
        )

    def _stand_in(
        self, waveforms: torch.Tensor | None, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, bool]:
        """(waveforms with at least one clip, whether they count).

        A batch without clips still sends silence through the encoder and projector, which then take part in every
        step on every rank; neither it nor the clips of a batch without answers may move BatchNorm statistics.
        """
        if waveforms is None:
            return None, True
        if waveforms.shape[0] == 0:
            return waveforms.new_zeros(1, self.config.encoder_config.clip_samples), False
        return waveforms, labels is None or bool((labels != IGNORE_INDEX).any())

    # -- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        waveforms: torch.Tensor | None = None,
        clip_row: torch.Tensor | None = None,
        clip_start: torch.Tensor | None = None,
        clip_index: torch.Tensor | None = None,
        audio_features: Mapping[str, torch.Tensor] | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """New token ids [B, new], end-of-text and padding included; greedy unless asked otherwise.

        Rows are left-padded prefixes (what `MellowProcessor` and evaluation batches give). Clips are encoded once.
        `generation_kwargs` are those of transformers: `max_new_tokens`, `num_beams`, `do_sample`, `streamer`, ...
        """
        inputs_embeds = generation_kwargs.pop("inputs_embeds", None)
        if inputs_embeds is None:
            # by a pass through the whole model, as each that follows: an engine may gather its weights there
            inputs_embeds = self(
                input_ids=input_ids, waveforms=waveforms, clip_row=clip_row, clip_start=clip_start,
                clip_index=clip_index, audio_features=audio_features, embeds_only=True,
            ).inputs_embeds  # fmt: skip
        return super().generate(  # type: ignore[misc]
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **generation_kwargs
        )


def _as_numbers_of(module: nn.Module, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features in the number format of the module's weights: stored ones are float16."""
    dtype = next(module.parameters()).dtype
    return {name: tensor.to(dtype) for name, tensor in features.items() if tensor is not None}


def _never_empty(attention_mask: torch.Tensor) -> torch.Tensor:
    """A row with nothing in it attends to all of itself: attention over nothing would be NaN, and spread backwards."""
    return torch.where(attention_mask.any(dim=1, keepdim=True), attention_mask, torch.ones_like(attention_mask))


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """[B, T] -> how many tokens stand before each; padding gets 0 or a repeat, on whichever side it is."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
