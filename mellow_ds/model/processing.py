"""Clips and prompts to what `generate()` takes, in the layout that the model was trained with; and ids back to text."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoProcessor,
    BatchFeature,
    ProcessorMixin,
    SequenceFeatureExtractor,
)

from mellow_ds.errors import MellowError
from mellow_ds.model.configuration import MellowConfig
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.prompt import Layout, encode_prompt, render_question


class MellowFeatureExtractor(SequenceFeatureExtractor):
    """Clips to waveforms of the clip window: shorter ones are padded with zeros, longer ones cut from the start on."""

    model_input_names = ["waveforms"]  # noqa: RUF012

    def __init__(self, sampling_rate: int = 32_000, clip_samples: int = 320_000, **kwargs: Any) -> None:
        """`sampling_rate` in Hz."""
        kwargs = {"feature_size": 1, "padding_value": 0.0, **kwargs}
        super().__init__(sampling_rate=sampling_rate, **kwargs)
        self.clip_samples = clip_samples

    def __call__(self, clips: Sequence[Any], sampling_rate: int | None = None) -> BatchFeature:
        """C mono clips, float in -1 .. 1, each [samples] -> `waveforms` [C, clip_samples] float32."""
        if sampling_rate not in (None, self.sampling_rate):
            raise MellowError(
                f"audio at {sampling_rate} Hz, but the model takes {self.sampling_rate}: resample it first"
            )
        waveforms = np.zeros((len(clips), self.clip_samples), dtype=np.float32)
        for number, clip in enumerate(clips):
            samples = np.asarray(clip, dtype=np.float32)
            if samples.ndim != 1:
                raise MellowError(f"clip {number + 1} has shape {samples.shape}: give mono clips, one axis of samples")
            if not np.isfinite(samples).all():
                raise MellowError(f"clip {number + 1} holds values that are not finite")
            kept = samples[: self.clip_samples]
            waveforms[number, : len(kept)] = kept
        return BatchFeature({"waveforms": torch.from_numpy(waveforms)})


class MellowProcessor(ProcessorMixin):
    """Feature extractor for clips, tokenizer for text, and the layout that puts them in a row."""

    def __init__(self, feature_extractor: Any, tokenizer: Any, layout: Layout | dict[str, Any] | None = None) -> None:
        super().__init__(feature_extractor, tokenizer)
        if layout is None:
            raise MellowError("a MellowProcessor needs the layout that its model was trained with")
        # kept as a dict, which is what transformers saves
        self.layout = asdict(layout) if isinstance(layout, Layout) else layout

    @property
    def row_layout(self) -> Layout:
        """How clips and prompt stand in a row."""
        return Layout(**{**self.layout, "prompt_suffix": tuple(self.layout["prompt_suffix"])})

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Sequence[Any] = (),
        return_tensors: str = "pt",
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Prompts and the clips of each -> input_ids and attention_mask [B, T] (left-padded), waveforms [C, S] and
        clip_row, clip_start, clip_index [P]: the arguments of `generate`.

        `text`: a prompt or B of them. `audio`: for one prompt its clips, for B a list of clips for each; a clip is
        mono, float [samples], at the model's sampling rate.
        """
        if return_tensors != "pt":
            raise MellowError(f"return_tensors is '{return_tensors}'; only 'pt' is supported")
        prompts = [text] if isinstance(text, str) else list(text)
        rows = [list(audio)] if isinstance(text, str) and not _is_nested(audio) else [list(clips) for clips in audio]
        rows = rows or [[] for _ in prompts]
        if len(rows) != len(prompts):
            raise MellowError(f"{len(prompts)} prompts but clips for {len(rows)}: give a list of clips for each prompt")
        clips: list[Any] = []
        sequences, placements = [], []
        for row, (prompt, own) in enumerate(zip(prompts, rows, strict=True)):
            indices = self._with_missing(list(range(len(clips), len(clips) + len(own))))
            clips += own
            prompt_ids = encode_prompt(self.tokenizer, render_question(prompt, "", (), None)[0])
            ids, starts = self.row_layout.prefix(len(indices), prompt_ids)
            sequences.append(ids)
            placements += [(row, start, index) for start, index in zip(starts, indices, strict=True)]
        return BatchFeature(
            {
                **_left_pad(sequences, placements, self.row_layout.end_id),
                **self.feature_extractor(clips, sampling_rate),
            }
        )

    def _with_missing(self, indices: list[int]) -> list[int]:
        """The clips of a row; in Mellow's layout its only clip stands in both places."""
        wanted = self.row_layout.num_clips
        if not wanted or len(indices) == wanted:
            return indices
        if not 0 < len(indices) < wanted:
            raise MellowError(f"{len(indices)} clips given; the model's layout takes 1 to {wanted}")
        return indices + [indices[0]] * (wanted - len(indices))


def build_processor(model: MellowForConditionalGeneration, tokenizer: Any, layout: Layout) -> MellowProcessor:
    """The processor that belongs to a model."""
    encoder = model.config.encoder_config
    extractor = MellowFeatureExtractor(sampling_rate=encoder.sampling_rate, clip_samples=encoder.clip_samples)
    return MellowProcessor(extractor, tokenizer, layout)


def _is_nested(audio: Sequence[Any]) -> bool:
    """Whether `audio` is a list of lists of clips, not a list of clips."""
    return (
        bool(len(audio)) and isinstance(audio[0], (list, tuple)) and not isinstance(next(iter(audio[0]), None), float)
    )


def _left_pad(
    sequences: list[tuple[int, ...]], placements: list[tuple[int, int, int]], pad_id: int
) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, longest - len(ids) :] = 1
    clip_row, clip_start, clip_index = torch.tensor(placements, dtype=torch.long).reshape(-1, 3).unbind(dim=1)
    shift = torch.tensor([longest - len(ids) for ids in sequences])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "clip_row": clip_row,
        "clip_start": clip_start + shift[clip_row],
        "clip_index": clip_index,
    }


# a folder that this project saved opens with transformers' Auto classes, once this module is imported
AutoConfig.register(MellowConfig.model_type, MellowConfig, exist_ok=True)
AutoModel.register(MellowConfig, MellowForConditionalGeneration, exist_ok=True)
AutoFeatureExtractor.register(MellowConfig, MellowFeatureExtractor, exist_ok=True)
AutoProcessor.register(MellowConfig, MellowProcessor, exist_ok=True)
