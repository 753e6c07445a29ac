"""From places of examples to a `Batch`: read, draw phrasings and crops, tokenize, decode each clip once, collate.

Everything random here is a function of (seed, epoch, example or clip); with seed None (evaluation) nothing is.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mellow_ds.data.audio import AudioError
from mellow_ds.data.batch import Batch
from mellow_ds.data.clips import Clips, FeatureClips, WaveformClips
from mellow_ds.data.collate import collate, empty_batch, prompt_row
from mellow_ds.data.kinds import Kinds
from mellow_ds.data.reader import BadSampleError, Place, Sample, ShardReader
from mellow_ds.data.shared_slots import SharedSlots, Ticket
from mellow_ds.errors import FaultError, ShardError
from mellow_ds.multiple_choice import shuffle_options
from mellow_ds.prompt import (
    ExampleRow,
    Layout,
    draw_number,
    encode_answer,
    encode_prompt,
    has_phrasings,
    render_question,
)
from mellow_ds.shard_format import Question


@dataclass(frozen=True)
class LoadStats:
    """What loading one or more micro-batches came to, on one rank."""

    num_examples: int = 0  # in the batches
    num_samples: int = 0  # read, good or bad
    num_bytes: int = 0  # read
    cut_prompts: int = 0  # longer than data.ip_text_len
    cut_answers: int = 0  # longer than data.op_text_len
    load_seconds: float = 0.0  # spent in loading, over all loader processes
    skipped_examples: int = 0  # left out because a sample was bad
    bad_samples: tuple[BadSampleError, ...] = ()

    def __add__(self, other: "LoadStats") -> "LoadStats":
        return LoadStats(
            self.num_examples + other.num_examples,
            self.num_samples + other.num_samples,
            self.num_bytes + other.num_bytes,
            self.cut_prompts + other.cut_prompts,
            self.cut_answers + other.cut_answers,
            self.load_seconds + other.load_seconds,
            self.skipped_examples + other.skipped_examples,
            self.bad_samples + other.bad_samples,
        )


@dataclass(frozen=True)
class EvalExample:
    """What an evaluator needs to know of a row that it did not give to the model."""

    id: str
    clips: tuple[str, ...]  # keys; examples of the same clips and question have their answers as common references
    sources: tuple[str, ...]  # paths of the clips below the audio root
    question: str  # as it was put to the model
    answer: str  # reference
    subtype: str
    taskname: str
    captions: tuple[str, ...]  # of the clips, where the records have them


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch with what is known of it."""

    batch: Batch
    examples: tuple[EvalExample, ...]  # in row order; none in training
    stats: LoadStats
    ticket: Ticket | None = None  # where the waveforms lie while they are on their way from a loader process

    def pin_memory(self) -> "LoadedBatch":
        """The same in page-locked memory (called by the DataLoader)."""
        return replace(self, batch=self.batch.pin_memory())

    def put_into(self, slots: SharedSlots, worker: int) -> "LoadedBatch":
        """The same with the waveforms in a slot of loader process `worker`, where they fit into one."""
        ticket = None if self.batch.waveforms is None else slots.put(worker, self.batch.waveforms)
        return self if ticket is None else replace(self, batch=replace(self.batch, waveforms=None), ticket=ticket)

    def taken_from(self, slots: SharedSlots, pin: bool) -> "LoadedBatch":
        """The inverse of `put_into`, in the trainer."""
        if self.ticket is None:
            return self
        waveforms = slots.take(self.ticket, pin)
        return replace(self, batch=replace(self.batch, waveforms=waveforms), ticket=None)


class _Found(NamedTuple):
    """An example as it was read: texts and compressed clips."""

    question: Question
    shard: int
    prompt: str
    answer: str
    samples: tuple[Sample | None, ...]  # of its clips, then distractors; None: silence
    crops: tuple[tuple[str, int], ...]  # (key, epoch) of those, which say what is cropped of each; "" for silence

    def evaluated(self) -> EvalExample:
        """What an evaluator needs to know."""
        asked = self.question
        sources = tuple(sample.info.source for sample in self.samples[: len(asked.clips)] if sample)
        texts = (self.prompt, self.answer, asked.subtype, asked.taskname, asked.captions)
        return EvalExample(asked.id, asked.clips, sources, *texts)


class BatchBuilder:
    """Builds micro-batches of examples of a reader; picklable, so that loader processes can hold one."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: Any,
        layout: Layout,
        clip_samples: int,
        seed: int | None,
        with_answers: bool = True,
        silence_audio: bool = False,
        shuffle_options: bool = False,
        kinds: Kinds | None = None,
    ) -> None:
        """`seed` None: evaluation (first phrasing, crop from the start). Without answers: rows for generation.

        `shuffle_options`: in training, options of multiple-choice questions stand in an order of their own each epoch.
        `kinds`: number the examples by them, to report the loss by kind.
        """
        self.reader = reader
        self.tokenizer = tokenizer
        self.layout = layout
        self.seed = seed
        self.with_answers = with_answers
        self.silence_audio = silence_audio
        self.shuffle_options = shuffle_options
        self.kinds = kinds
        self.clips: Clips = WaveformClips(reader.sampling_rate, clip_samples)
        if reader.features is not None:
            self.clips = FeatureClips(reader.features)

    def waveform_bytes(self, num_examples: int) -> int:
        """Bytes of the waveforms of so many examples of two clips, which few have more of; 0 for features."""
        if self.reader.features is not None:
            return 0
        return (
            self.clips.buffer(0).itemsize * self.clips.buffer(0).shape[1] * num_examples * max(self.layout.num_clips, 2)
        )

    def build(self, places: np.ndarray) -> LoadedBatch:
        """The micro-batch of the examples at `places` ([n, 3] shard, question number and epoch; n may be 0).

        A sample that cannot be used leaves its examples out and is named in the stats; the batch is then of the others.
        """
        started = time.perf_counter()
        reading = _Reading(self.reader)
        looked_up = [self._find(reading, shard, number, epoch) for shard, number, epoch in places.tolist()]
        found = [example for example in looked_up if example is not None]
        audio, clip_numbers = self._decode(found, reading)
        kept = [example for example in found if all(crop in clip_numbers for crop in example.crops)]
        rows, cut_prompts, cut_answers = self._rows(kept)
        if rows:
            clips = [[clip_numbers[crop] for crop in example.crops] for example in kept]
            ids = [example.question.id for example in kept]
            kinds = self._kinds_of(kept)
            batch = collate(rows, clips, audio, ids, self.layout.end_id, pad_left=not self.with_answers, kinds=kinds)
        else:
            batch = empty_batch(self.layout, self.clips.tensors(np.zeros_like(self.clips.buffer(1))))
        stats = LoadStats(
            num_examples=len(rows),
            num_samples=reading.num_samples,
            num_bytes=reading.num_bytes,
            cut_prompts=cut_prompts,
            cut_answers=cut_answers,
            load_seconds=time.perf_counter() - started,
            skipped_examples=len(places) - len(rows),
            bad_samples=tuple(reading.bad.values()),
        )
        examples = () if self.seed is not None else tuple(example.evaluated() for example in kept)
        return LoadedBatch(batch, examples, stats)

    def _find(self, reading: "_Reading", shard: int, number: int, epoch: int) -> _Found | None:
        """Read one example; None where a sample of it is bad."""
        try:
            row, in_sample = self.reader.locate(shard, number)
            sample = reading.sample(shard, row)
            question = sample.question(in_sample)
            rows = self.reader.rows_of(shard, question, sample, row)
            samples: list[Sample | None] = [sample if each == row else reading.sample(shard, each) for each in rows]
            if self.layout.num_clips:
                samples += self._distractors(reading, shard, question, rows, epoch)
        except BadSampleError as error:
            reading.bad[error.place] = error
            return None
        draw = None
        if self.seed is not None and has_phrasings(question.input):
            draw = draw_number("phrasing", self.seed, epoch, question.id)
        prompt, answer = render_question(question.input, question.answer, question.captions, draw)
        if self.shuffle_options and self.seed is not None:
            prompt, answer = shuffle_options(prompt, answer, draw_number("options", self.seed, epoch, question.id))
        crops = tuple([(sample.place.key if sample else "", epoch) for sample in samples])
        return _Found(question, shard, prompt, answer, tuple(samples), crops)

    def _distractors(
        self, reading: "_Reading", shard: int, question: Question, rows: Sequence[int], epoch: int
    ) -> Iterator[Sample | None]:
        """Clips for the places that Mellow's layout has and the example has not: others of its shard, or silence."""
        missing = self.layout.num_clips - len(rows)
        if missing < 0:
            raise ShardError(
                f"question {question.id} is about {len(rows)} clips, but model.layout 'mellow' takes "
                f"{self.layout.num_clips}: use model.layout 'compact', or leave the question out"
            )
        others = self.reader.num_samples(shard) - len(set(rows))
        for number in range(missing):
            if not others and self.reader.features is not None:
                raise ShardError(
                    f"question {question.id} stands in a shard without another clip, and there are no features of "
                    "silence to stand in for one: make larger shards, or use model.layout 'compact'"
                )
            if not others:
                yield None
                continue
            draw = draw_number("distractor", self.seed, epoch if self.seed is not None else 0, question.id, number)
            row = draw % others
            for taken in sorted(set(rows)):
                row += taken <= row
            yield reading.sample(shard, row)

    def _decode(
        self, found: Sequence[_Found], reading: "_Reading"
    ) -> tuple[dict[str, torch.Tensor], dict[tuple[str, int], int]]:
        """Tensors of the different crops, and the number of each by its clip and epoch; bad ones have none."""
        samples = {
            crop: sample for example in found for crop, sample in zip(example.crops, example.samples, strict=True)
        }
        buffer = self.clips.buffer(len(samples))
        numbers: dict[tuple[str, int], int] = {}
        for (key, epoch), sample in samples.items():
            if sample is None or self.silence_audio:
                buffer[len(numbers)] = 0
            else:
                try:
                    self.clips.fill(buffer[len(numbers)], sample, self.seed, epoch)
                except AudioError as error:
                    reading.bad[sample.place] = BadSampleError(sample.place, "audio", f"{error}; build the shards anew")
                    continue
            numbers[key, epoch] = len(numbers)
        return self.clips.tensors(buffer[: len(numbers)]), numbers

    def _rows(self, examples: Sequence[_Found]) -> tuple[list[ExampleRow], int, int]:
        """(rows, prompts that were cut, answers that were cut)."""
        layout, rows, cut_prompts, cut_answers = self.layout, [], 0, 0
        for example in examples:
            prompt_ids = self._ids(encode_prompt, example, example.prompt)
            cut_prompts += len(prompt_ids) > layout.max_prompt_tokens - len(layout.prompt_suffix)
            if self.with_answers:
                answer_ids = self._ids(encode_answer, example, example.answer)
                cut_answers += len(answer_ids) + 1 > layout.max_answer_tokens
                rows.append(layout.example(len(example.samples), prompt_ids, answer_ids))
            else:
                rows.append(prompt_row(layout, len(example.samples), prompt_ids))
        return rows, cut_prompts, cut_answers

    def _kinds_of(self, examples: Sequence[_Found]) -> list[int] | None:
        if self.kinds is None:
            return None
        return [self.kinds.number(example.shard, example.question.subtype) for example in examples]

    def _ids(self, encode: Callable[[Any, str], list[int]], example: _Found, text: str) -> list[int]:
        try:
            return encode(self.tokenizer, text)
        except Exception as error:
            names = f"question {example.question.id} about {', '.join(example.question.clips)}"
            raise FaultError(
                f"{names}: the tokenizer fails on {text[:80]!r} ({type(error).__name__}: {error})"
            ) from error


class _Reading:
    """The samples that one micro-batch reads, each once."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._samples: dict[tuple[int, int], Sample | BadSampleError] = {}
        self.bad: dict[Place, BadSampleError] = {}
        self.num_samples = 0
        self.num_bytes = 0

    def sample(self, shard: int, row: int) -> Sample:
        """A sample, read when first asked for; raises the same `BadSampleError` each time for a bad one."""
        if (shard, row) not in self._samples:
            self.num_samples += 1
            self._samples[shard, row] = self._read(shard, row)
        found = self._samples[shard, row]
        if isinstance(found, BadSampleError):
            raise found
        return found

    def _read(self, shard: int, row: int) -> Sample | BadSampleError:
        try:
            sample = self._reader.sample(shard, row)
        except BadSampleError as error:
            return error
        self.num_bytes += sample.num_bytes
        return sample
