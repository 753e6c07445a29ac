"""Lengths of prompts and answers in tokens, from a sample of the shards' questions spread over all of them."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import fmean
from typing import Any

from mellow_ds.config.schema import RunConfig
from mellow_ds.data.reader import ShardReader
from mellow_ds.doctor.facts import TextFacts
from mellow_ds.prompt import Layout, encode_answer, encode_prompt, render_question
from mellow_ds.shard_format import Question

NUM_SAMPLED = 2000  # questions; a share that is cut is then known to within 2 percent
_MAX_SHARDS = 8  # that the sample is taken from: the JSON of a whole shard is read
_CHARACTERS_A_TOKEN = 3.5  # of English under a vocabulary of 49,152: short, so that lengths are rather overestimated
_MELLOW_CLIPS = 2
_MELLOW_SUFFIX = 2  # tokens of " <|endoftext|>" after a prompt in Mellow's layout
_PAD = -1

Length = Callable[[str], int]


def sample_questions(reader: ShardReader, number: int = NUM_SAMPLED) -> list[Question]:
    """About `number` questions, from the beginnings of shards evenly spaced over all; nothing is random."""
    num_shards = len(reader.shards)
    num_chosen = min(_MAX_SHARDS, num_shards)
    chosen = [num_shards * i // num_chosen for i in range(num_chosen)]
    share = -(-number // num_chosen)
    return [question for shard in chosen for question in islice(_questions(reader, shard), share)]


def text_facts(
    questions: list[Question], config: RunConfig, audio_tokens: int, tokenizer: Any | None
) -> TextFacts | None:
    """Lengths as the run would make them; None without questions. Without a tokenizer they are estimated by
    characters."""
    if not questions:
        return None
    prompt_length, answer_length = _lengths(tokenizer)
    layout = _layout(config, audio_tokens)
    prompts, answers, rows, learned, clips = [], [], [], [], []
    for number, question in enumerate(questions):
        prompt, answer = render_question(question.input, question.answer, question.captions, number)
        prompts.append(prompt_length(prompt))
        answers.append(answer_length(answer) + 1)
        num_clips = max(len(question.clips), layout.num_clips)
        row = layout.example(num_clips, [0] * prompts[-1], [0] * (answers[-1] - 1))
        rows.append(len(row.input_ids))
        learned.append(row.num_answer_tokens)
        clips.append(num_clips)
    room = layout.max_prompt_tokens - len(layout.prompt_suffix)
    return TextFacts(
        num_sampled=len(questions),
        is_estimate=tokenizer is None,
        num_cut_prompts=sum(length > room for length in prompts),
        num_cut_answers=sum(length > layout.max_answer_tokens for length in answers),
        longest_prompt=max(prompts),
        longest_answer=max(answers),
        mean_row=fmean(rows),
        longest_row=max(rows),
        mean_answer=fmean(learned),
        mean_clips=fmean(clips),
    )


def texts_of(questions: list[Question]) -> Iterator[str]:
    """Prompts and answers as they are tokenized, for a tokenizer that is made from them."""
    for number, question in enumerate(questions):
        yield from render_question(question.input, question.answer, question.captions, number)


def _questions(reader: ShardReader, shard: int) -> Iterator[Question]:
    for info in reader.infos(shard):
        yield from info.questions


def _lengths(tokenizer: Any | None) -> tuple[Length, Length]:
    if tokenizer is None:

        def estimate(text: str) -> int:
            return math.ceil(len(text) / _CHARACTERS_A_TOKEN)

        return estimate, estimate
    return lambda text: len(encode_prompt(tokenizer, text)), lambda text: len(encode_answer(tokenizer, text))


def _layout(config: RunConfig, audio_tokens: int) -> Layout:
    """The run's layout as far as lengths go; the ids are no tokenizer's."""
    data, mellow = config.data, config.model.layout == "mellow"
    return Layout(
        audio_tokens=audio_tokens,
        separator_id=0,
        end_id=0,
        max_prompt_tokens=data.ip_text_len,
        max_answer_tokens=data.op_text_len,
        num_clips=_MELLOW_CLIPS if mellow else 0,
        prompt_suffix=(0,) * _MELLOW_SUFFIX if mellow else (),
        prompt_pad_id=_PAD if mellow else None,
    )
