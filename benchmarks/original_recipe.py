"""A plain implementation of the original Mellow recipe, to be measured against. Nothing in the library uses it.

Written from facts about the original (its layout and outputs stand with the parity fixtures): every example is 639
positions (two clips of 129 tokens, each with a separator, a prompt of 129, an answer of 250), all of them attended to;
logits of all positions; two clips always, encoded one after the other, a missing one replaced by a distractor; the
frozen encoder runs in train mode and with grad enabled; generation runs the whole sequence for each token. The blocks
(Swin trunk, Llama, mel spectrogram) are the same libraries' as in `mellow_ds`, so that what differs is the recipe.
SpecAugment and the top-p filter before the argmax, which cost next to nothing, are left out.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from torchaudio.transforms import MelSpectrogram
from transformers import AutoModelForCausalLM, ClapAudioConfig, PretrainedConfig
from transformers.models.clap.modeling_clap import ClapAudioEncoder

PROMPT_TOKENS = 129
ANSWER_TOKENS = 250

_FRAMES = 1024  # the 32 frames of posteriors, each 32 times
_POOLED = 8  # runs of projected frames that are averaged: 128 tokens


class OriginalEncoder(nn.Module):
    """Waveforms to a latent and 1,024 frames, of which 32 differ."""

    def __init__(self, trunk: ClapAudioConfig, num_classes: int) -> None:
        super().__init__()
        self.mel = MelSpectrogram(
            32_000, n_fft=1024, hop_length=320, f_min=50, f_max=14_000, n_mels=64, norm="slaney", mel_scale="slaney"
        )
        self.trunk = ClapAudioEncoder(trunk)
        width = self.trunk.num_features
        self.tscam_conv = nn.Conv2d(width, num_classes, (2, 3), padding=(0, 1))
        self.c2l = nn.Linear(num_classes, width)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, 1025, width]."""
        decibels = 10 * torch.log10(self.mel(waveforms).clamp(min=1e-10))
        output = self.trunk(decibels.transpose(1, 2).unsqueeze(1))
        posteriors = torch.sigmoid(self.tscam_conv(output.last_hidden_state).flatten(2)).transpose(1, 2)
        repeated = posteriors.repeat_interleave(_FRAMES // posteriors.shape[1], dim=1)
        return torch.cat([output.pooler_output.unsqueeze(1), self.c2l(repeated)], dim=1)


class OriginalProjection(nn.Module):
    """Mellow's projector, dropout 0.5."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_in, d_out, bias=False)
        self.linear2 = nn.Linear(d_out, d_out, bias=False)
        self.layer_norm = nn.LayerNorm(d_out)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_in] -> [..., d_out]."""
        embedded = self.linear1(x)
        return self.layer_norm(embedded + self.dropout(self.linear2(functional.gelu(embedded))))


class OriginalRecipe(nn.Module):
    """The whole network: loss of a padded batch, and greedy generation."""

    def __init__(
        self, trunk: ClapAudioConfig, text_config: PretrainedConfig, num_classes: int, end_id: int, pad_id: int
    ) -> None:
        super().__init__()
        self.encoder = OriginalEncoder(trunk, num_classes)
        self.projection = OriginalProjection(self.encoder.trunk.num_features, text_config.hidden_size)
        self.decoder = AutoModelForCausalLM.from_config(text_config)
        self.end_id = end_id
        self.pad_id = pad_id
        for frozen in (self.encoder.trunk, self.encoder.tscam_conv):
            frozen.requires_grad_(False)

    def audio_tokens(self, waveforms: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, 129, D]."""
        projected = self.projection(self.encoder(waveforms))
        frames = functional.avg_pool1d(projected[:, 1:].transpose(1, 2), _POOLED).transpose(1, 2)
        return torch.cat([projected[:, :1], frames], dim=1)

    def prefix(self, first: torch.Tensor, second: torch.Tensor, prompt_ids: torch.Tensor) -> torch.Tensor:
        """Two clips [B, S] each and prompts [B, P] -> everything before the answer [B, 260 + P, D]."""
        embed = self.decoder.get_input_embeddings()
        separator = embed(prompt_ids.new_full((len(prompt_ids), 1), self.end_id))
        return torch.cat(
            [self.audio_tokens(first), separator, self.audio_tokens(second), separator, embed(prompt_ids)], dim=1
        )

    def answer_logits(
        self, first: torch.Tensor, second: torch.Tensor, prompt_ids: torch.Tensor, answer_ids: torch.Tensor
    ) -> torch.Tensor:
        """... and answers [B, N] -> logits that predict each answer token [B, N, V]; all positions' are computed."""
        prefix = self.prefix(first, second, prompt_ids)
        inputs = torch.cat([prefix, self.decoder.get_input_embeddings()(answer_ids)], dim=1)
        logits = self.decoder(inputs_embeds=inputs, use_cache=False).logits
        return logits[:, prefix.shape[1] - 1 : -1]

    def forward(
        self, first: torch.Tensor, second: torch.Tensor, prompt_ids: torch.Tensor, answer_ids: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy over the answer tokens that are not padding."""
        logits = self.answer_logits(first, second, prompt_ids, answer_ids)
        return functional.cross_entropy(logits.flatten(0, 1), answer_ids.flatten(), ignore_index=self.pad_id)

    def generate(self, first: torch.Tensor, second: torch.Tensor, prompt_ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the next token of each row [B], without end: the whole sequence runs again for each, as there."""
        embed = self.decoder.get_input_embeddings()
        with torch.no_grad():
            sequence = self.prefix(first, second, prompt_ids)
        while True:
            with torch.no_grad():  # left before each yield, so that the caller's own mode is not touched
                logits = self.decoder(inputs_embeds=sequence, use_cache=False).logits
                token = logits[:, -1].argmax(dim=-1)
                sequence = torch.cat([sequence, embed(token)[:, None]], dim=1)
            yield token


def pad_text(ids: tuple[int, ...], suffix: tuple[int, ...], pad_id: int, length: int) -> list[int]:
    """A prompt or an answer as the original's tokenizer gives it: end-of-text, then padding up to `length`."""
    whole = [*ids, *suffix][:length]
    return whole + [pad_id] * (length - len(whole))
