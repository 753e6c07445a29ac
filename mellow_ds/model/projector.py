"""From what the encoder gives to tokens of the decoder's width: `c2l` for posteriors, then Mellow's projector."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from mellow_ds.model.configuration import CNN14, HTSAT, HTSAT_REPEATED_TOKENS, MellowEncoderConfig


class MellowProjector(nn.Module):
    """Tokens in the order latent, frames (HTSAT) or clip, frames (Cnn14)."""

    def __init__(self, encoder_config: MellowEncoderConfig, d_proj: int, dropout: float) -> None:
        super().__init__()
        out_emb = encoder_config.out_emb
        has_posteriors = encoder_config.kind in (HTSAT, CNN14)
        self.c2l = nn.Linear(encoder_config.num_classes, out_emb) if has_posteriors else None
        self.linear1 = nn.Linear(out_emb, d_proj, bias=False)
        self.linear2 = nn.Linear(d_proj, d_proj, bias=False)
        self.layer_norm = nn.LayerNorm(d_proj)
        self.dropout = nn.Dropout(dropout)
        self.posteriors_first = encoder_config.kind == CNN14
        self.frame_repeats = (
            4 if encoder_config.kind == HTSAT and encoder_config.audio_tokens == HTSAT_REPEATED_TOKENS else 1
        )

    def forward(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Features of C clips (fields of `AudioFeatures`) -> tokens [C, A, d_proj]."""
        parts = [features["embeddings"]]
        if self.c2l is not None:
            parts.insert(0 if self.posteriors_first else 1, self.c2l(features["posteriors"]))
        embedded = self.linear1(torch.cat(parts, dim=1))
        tokens = self.layer_norm(embedded + self.dropout(self.linear2(functional.gelu(embedded))))
        if self.frame_repeats > 1:
            # the original projects each of the 32 frames 32 times and averages runs of 8: 4 equal tokens a frame
            frames = tokens[:, 1:].repeat_interleave(self.frame_repeats, dim=1)
            tokens = torch.cat([tokens[:, :1], frames], dim=1)
        return tokens
