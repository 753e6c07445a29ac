"""What crosses from data to model: one micro-batch, as tensors."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

IGNORE_INDEX = -100  # label of a position that the loss does not count; the value that transformers uses


@dataclass(frozen=True)
class Batch:
    """B examples over C different clips (a clip that several examples share stands once)."""

    waveforms: torch.Tensor | None
    """[C, S] int16 (float32 in -1 .. 1 is taken too), zero-padded to the clip window; None where there are features.

    Samples stay as they are stored until they are on the device: passing them on from a loader process costs more than
    reading them, and half of it as 16-bit numbers.
    """
    input_ids: torch.Tensor
    """[B, T] int64; the separator's id where audio tokens go; right-padded in training, left-padded for generation."""
    attention_mask: torch.Tensor
    """[B, T] int64, 1 where there is something."""
    labels: torch.Tensor
    """[B, T] int64, the token itself where it is an answer token (end-of-text included), else IGNORE_INDEX."""
    clip_row: torch.Tensor
    """[P] int64: placement p puts its clip's tokens into this row ..."""
    clip_start: torch.Tensor
    """[P] int64: ... from this position on ..."""
    clip_index: torch.Tensor
    """[P] int64: ... and takes them from this clip of `waveforms`."""
    example_ids: tuple[str, ...] = ()
    """Ids of the examples, in row order; empty where the batch only keeps step with the other ranks."""

    embeddings: torch.Tensor | None = None
    """[C, E, D] float16: what a frozen encoder made of the clips, from feature shards."""
    posteriors: torch.Tensor | None = None
    """[C, P, classes] float16, with the embeddings, of encoders that give them."""
    kinds: torch.Tensor | None = None
    """[B] int64: the kind of each example, to report the loss by; None where it is not asked for."""

    @property
    def num_examples(self) -> int:
        """Examples that count."""
        return len(self.example_ids)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels != IGNORE_INDEX).sum())

    def model_inputs(self) -> dict[str, Any]:
        """The arguments of the model's `forward`; without `labels` those of `generate`."""
        names = ("waveforms", "input_ids", "attention_mask", "labels", "clip_row", "clip_start", "clip_index")
        inputs: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.embeddings is not None:
            inputs["audio_features"] = {"embeddings": self.embeddings, "posteriors": self.posteriors}
        return inputs

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by the DataLoader)."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {n: change(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        return Batch(**changed)
