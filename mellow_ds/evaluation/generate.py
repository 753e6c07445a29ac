"""One answer from audio files and a prompt: what `mellow-ds generate` does once it has a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mellow_ds.errors import MellowError
from mellow_ds.evaluation.evaluate import answer_text
from mellow_ds.packing.decode import BadClip, decode_mono, read_source, resample, to_int16

if TYPE_CHECKING:
    import numpy as np


def read_clip(path: str | Path, sample_rate: int) -> "np.ndarray":
    """[samples] float32 in -1 .. 1, mono at `sample_rate` Hz: what the model would get from a shard made of this file.

    Rounded to 16 bits as shards are, so that an answer does not depend on the way of its audio. Raises `MellowError`
    naming the file.
    """
    try:
        mono, source_rate = decode_mono(read_source(Path(path)))
    except BadClip as error:
        detail = f" ({error.detail})" if error.detail else ""
        raise MellowError(
            f"{path}: {error.reason}{detail}: give an audio file that libsndfile reads (WAV, FLAC, Ogg, MP3)"
        ) from None
    return to_int16(resample(mono, source_rate, sample_rate)).astype("float32") / 32768.0


def generate_answer(
    model: Any, processor: Any, audio_paths: Sequence[str | Path], prompt: str, max_new_tokens: int = 64
) -> str:
    """The greedy answer of `model` to `prompt` about the clips, in this order; the part of each that its window holds.

    `model` and `processor` as `mellow_ds.model` makes them. Raises `MellowError` where a file cannot be read or the
    prompt is empty.
    """
    import torch

    if not prompt.strip():
        raise MellowError("the prompt is empty: ask something about the audio")
    clips = [read_clip(path, processor.feature_extractor.sampling_rate) for path in audio_paths]
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in processor(prompt, clips).items()}
    end_id = processor.row_layout.end_id
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            new_ids = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=end_id,
                pad_token_id=end_id,
            )
    finally:
        model.train(was_training)
    return answer_text(new_ids[0].tolist(), processor.tokenizer, end_id, max_new_tokens)[0]
