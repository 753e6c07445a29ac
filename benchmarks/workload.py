"""Which examples the benchmarks run: families of questions in the shares of ReasonAQA, lengths drawn, ids at random.

Question counts and numbers of clips are those of ReasonAQA's train split (Zenodo 15036628). Lengths in SmolLM2 tokens
are ASSUMED, uniform over the stated ranges: the data set is not needed to run this. No torch.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

END_ID = 0  # end-of-text of SmolLM2, which also separates clips
PAD_ID = 17  # the token "!", which the original pads with
END_SUFFIX = (216, END_ID)  # what the original puts behind prompt and answer: " <|endoftext|>"
FIRST_FREE_ID = 300  # drawn ids start here, clear of the above


@dataclass(frozen=True)
class Family:
    """Questions of one kind. Token ranges include both ends; the answer's includes end-of-text."""

    name: str
    num_questions: int
    num_clips: int
    prompt_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]


FAMILIES = (
    Family("multiple choice", 95_551 + 241_531, 1, (35, 70), (4, 12)),
    Family("detailed question", 94_838 + 239_132, 1, (12, 28), (15, 55)),
    Family("caption", 19_195 + 48_660, 1, (5, 12), (12, 28)),
    Family("difference in few words", (57_585 + 145_980) // 3, 2, (8, 20), (25, 50)),
    Family("difference in a sentence", (57_585 + 145_980) // 3, 2, (8, 20), (45, 90)),
    Family("difference in detail", (57_585 + 145_980) // 3, 2, (8, 20), (110, 230)),
    Family("yes or no", 14_088, 1, (8, 16), (2, 2)),
    Family("entailment", 11_511, 1, (15, 35), (2, 4)),
)


@dataclass(frozen=True)
class Example:
    """A question with its answer; its clips are numbered by `clips_of`."""

    family: str
    num_clips: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # without end-of-text


def draw_examples(count: int, seed: int, vocab_size: int) -> list[Example]:
    """`count` examples in random order, the families in their shares to within one example (systematic sampling)."""
    source = random.Random(seed)
    total = sum(family.num_questions for family in FAMILIES)
    examples = []
    for number in range(count):
        family = _family_at((number + 0.5) / count * total)
        num_prompt, num_answer = (source.randint(*limits) for limits in (family.prompt_tokens, family.answer_tokens))
        ids = [source.randrange(FIRST_FREE_ID, vocab_size) for _ in range(num_prompt + num_answer - 1)]
        examples.append(Example(family.name, family.num_clips, tuple(ids[:num_prompt]), tuple(ids[num_prompt:])))
    source.shuffle(examples)
    return examples


def _family_at(question: float) -> Family:
    for family in FAMILIES:
        question -= family.num_questions
        if question < 0:
            return family
    return FAMILIES[-1]


def batches(examples: list[Example], batch_size: int) -> Iterator[list[Example]]:
    """The examples in runs of `batch_size`."""
    for start in range(0, len(examples), batch_size):
        yield examples[start : start + batch_size]


def clips_of(number: int, num_clips: int) -> list[int]:
    """Rows of a batch's waveforms that example `number` hears: two stand there for each, the second may be a
    distractor that only the original encodes."""
    return [2 * number + clip for clip in range(num_clips)]


def describe(examples: list[Example]) -> dict[str, Any]:
    """What was drawn and from what, for the result file."""
    lengths = {
        "prompt": sorted(len(example.prompt_ids) for example in examples),
        "answer": sorted(len(example.answer_ids) + 1 for example in examples),
    }
    return {
        "families": [
            {
                "name": family.name,
                "questions": family.num_questions,
                "clips": family.num_clips,
                "prompt_tokens": list(family.prompt_tokens),
                "answer_tokens": list(family.answer_tokens),
                "examples_drawn": sum(example.family == family.name for example in examples),
            }
            for family in FAMILIES
        ],
        "lengths": "uniform over the ranges, which are assumed; families, questions and clips are ReasonAQA's",
        "examples": len(examples),
        "with_two_clips": sum(example.num_clips == 2 for example in examples),
        **{
            f"{name}_tokens_mean_median_most": [
                round(math.fsum(values) / len(values), 1),
                values[len(values) // 2],
                values[-1],
            ]
            for name, values in lengths.items()
        },
    }
