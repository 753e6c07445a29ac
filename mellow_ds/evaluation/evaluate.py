"""Evaluation of a model on held-out examples: generate on all ranks, merge on rank 0, score, write the results.

Knows neither the trainer nor the engine: it takes a model with `generate`, batches, and a barrier.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mellow_ds.config.schema import EvaluationConfig
from mellow_ds.evaluation.captions import caption_items, caption_metrics
from mellow_ds.evaluation.predictions import (
    Prediction,
    RankPredictions,
    merge_predictions,
    score_prediction,
    write_aside,
)
from mellow_ds.evaluation.results import RESULTS_NAME, summarise
from mellow_ds.world import World

if TYPE_CHECKING:
    import torch

    from mellow_ds.data.batch import Batch

SILENCED_NAME = "silenced"  # folder of the predictions without audio
_PROGRESS_SECONDS = 30.0  # between lines where stderr is no terminal


class EvalExample(Protocol):
    """What evaluation needs of an example, beside its row in the batch."""

    @property
    def id(self) -> str:
        """Content hash of the question."""

    @property
    def question(self) -> str:
        """As rendered for the model."""

    @property
    def answer(self) -> str:
        """As rendered for the model."""

    @property
    def subtype(self) -> str:
        """As in the record."""

    @property
    def clips(self) -> Sequence[str]:
        """Keys of the clips, in the order of the sequence."""


class EvalBatches(Protocol):
    """One rank's batches with their examples in row order, to be iterated once (`mellow_ds.data.stream.EvalStream`)."""

    def __iter__(self) -> Iterator[tuple["Batch", Sequence[EvalExample]]]:
        """Left-padded prefixes without answers."""

    def close(self) -> None:
        """End what loads them."""


class TextDecoder(Protocol):
    """A tokenizer, as far as evaluation needs it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""


def evaluate(
    model: Any,
    open_batches: Callable[[bool], EvalBatches],
    tokenizer: TextDecoder,
    world: World,
    config: EvaluationConfig,
    out_folder: str | Path,
    *,
    num_expected: int,
    end_id: int,
    device: "torch.device | str" = "cpu",
    autocast_dtype: "torch.dtype | None" = None,
    in_step: bool = False,
    barrier: Callable[[], None] = lambda: None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate `model` on this rank's batches; rank 0 writes predictions.jsonl and results.json into `out_folder`.

    `open_batches(silence_audio)` gives this rank's batches; together the ranks' hold `num_expected` different examples.
    With `config.compare_silence` there is a second pass, with `silence_audio` True, whose predictions stand in
    `out_folder/silenced`. `out_folder` is one that all ranks see. `end_id` is the end-of-text token. `in_step`: the
    ranks make every pass through the model together, as they must where it gathers weights; they bring as many batches
    each, some perhaps without examples. `barrier` returns
    when all ranks have called it (twice in a pass, never while captions are scored). `about` is written into
    results.json as it is (checkpoint, step, shards).

    Rank 0 returns the results: those of `summarise`; `silenced`: the same without audio, or None; `captions` (of
    `caption_metrics`, by subtype); `generation` (`seconds`, and `examples_per_second` over all ranks, loading
    included); `max_new_tokens` and `about`. Other ranks return {}. Raises `FaultError` where examples are missing or
    double.
    """
    folder = Path(out_folder)
    generator = _Generator(model, tokenizer, config.max_new_tokens, end_id, device, autocast_dtype, in_step)
    started = time.monotonic()
    predictions = _one_pass(generator, open_batches(False), world, folder, num_expected, barrier)
    seconds = time.monotonic() - started
    silenced: list[Prediction] | None = None
    if config.compare_silence:
        silenced = _one_pass(generator, open_batches(True), world, folder / SILENCED_NAME, num_expected, barrier)
    if not world.is_main:
        return {}
    results = {
        **summarise(predictions),
        "silenced": None if silenced is None else summarise(silenced),
        "captions": caption_metrics(caption_items(predictions)) if config.captions else {},
        "generation": {"seconds": seconds, "examples_per_second": len(predictions) / seconds, "world_size": world.size},
        "max_new_tokens": config.max_new_tokens,
        "about": dict(about or {}),
    }
    write_aside(folder / RESULTS_NAME, [json.dumps(results, indent=1, ensure_ascii=False) + "\n"])
    return results


def _one_pass(
    generator: "_Generator",
    batches: EvalBatches,
    world: World,
    folder: Path,
    num_expected: int,
    barrier: Callable[[], None],
) -> list[Prediction]:
    """All ranks' predictions on rank 0, nothing on the others."""
    with contextlib.closing(batches), RankPredictions(folder, world.rank) as file, generator.running():
        for batch, examples in _with_progress(batches, world, num_expected):
            for prediction in generator.predict(batch, examples):
                file.write(prediction)
    barrier()
    try:
        # the ranks' files are gone when the others go on, so that their next pass may write new ones
        return merge_predictions(folder, world.size, num_expected) if world.is_main else []
    finally:
        barrier()


@dataclass(frozen=True)
class _Generator:
    """A model with all that it takes to answer a batch."""

    model: Any
    tokenizer: TextDecoder
    max_new_tokens: int
    end_id: int
    device: "torch.device | str"
    autocast_dtype: "torch.dtype | None"
    in_step: bool

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode without gradients, in the number format of training; the model's mode is put back after."""
        import torch

        was_training = self.model.training
        self.model.eval()
        precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.autocast_dtype is not None:
            precision = torch.autocast(torch.device(self.device).type, self.autocast_dtype)
        try:
            # not inference_mode: its tensors may not be used again where gradients are taken, and models keep some
            with torch.no_grad(), precision:
                yield
        finally:
            self.model.train(was_training)

    def predict(self, batch: "Batch", examples: Sequence[EvalExample]) -> list[Prediction]:
        """Greedy answers to the examples of a batch; rows beyond `examples` only keep step with other ranks."""
        if not examples and not self.in_step:
            return []
        inputs = batch.to(self.device, non_blocking=True).model_inputs()
        del inputs["labels"]
        new_ids = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.end_id,
            pad_token_id=self.end_id,
            synced_gpus=self.in_step,  # else none waits for the others, which may be done
        )
        rows = new_ids.tolist()[: len(examples)]
        answers = [answer_text(row, self.tokenizer, self.end_id, self.max_new_tokens) for row in rows]
        return [
            score_prediction(e.id, e.subtype, tuple(e.clips), e.question, e.answer, text, finished)
            for e, (text, finished) in zip(examples, answers, strict=True)
        ]


def answer_text(row: list[int], tokenizer: TextDecoder, end_id: int, max_new_tokens: int) -> tuple[str, bool]:
    """(text before end-of-text, whether it ended by itself) of new token ids."""
    finished = end_id in row or len(row) < max_new_tokens
    ids = row[: row.index(end_id)] if end_id in row else row
    # other special tokens (unknown, masks) stay visible: left out, they could make a wrong answer right
    return tokenizer.decode(ids, skip_special_tokens=False).strip(), finished


def _with_progress(
    batches: EvalBatches, world: World, num_expected: int
) -> Iterator[tuple["Batch", Sequence[EvalExample]]]:
    """The same batches; rank 0 shows how far it is: a bar in a terminal, else a line now and then."""
    if not world.is_main:
        yield from batches
        return
    from tqdm import tqdm

    logger = logging.getLogger("mellow_ds")
    num_own = -(-num_expected // world.size)  # ranks' shares differ by little
    in_terminal = sys.stderr.isatty()
    last_line = time.monotonic()
    num_done = 0
    with tqdm(total=num_own, desc="evaluating", unit="ex", disable=not in_terminal, leave=False) as bar:
        for batch, examples in batches:
            yield batch, examples
            num_done += len(examples)
            bar.update(len(examples))
            if not in_terminal and time.monotonic() - last_line >= _PROGRESS_SECONDS:
                last_line = time.monotonic()
                logger.info("evaluating: %d of about %d examples on this rank", num_done, num_own)
