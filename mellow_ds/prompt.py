"""Phrasings and the layout of a sequence, once, for the data side and for the model's processor. No torch.

A sequence is: tokens of clip 1, separator, tokens of clip 2, separator, ..., prompt, answer, end-of-text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What a placeholder in a record's `input` stands for. Evaluation takes the first, training draws one.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "caption first audio": (
        "describe the first audio",
        "what is heard in the first audio?",
        "write a caption for the first recording",
        "summarize the sounds of audio 1",
        "tell me what happens in the first clip",
    ),
    "caption second audio": (
        "describe the second audio",
        "what is heard in the second audio?",
        "write a caption for the second recording",
        "summarize the sounds of audio 2",
        "tell me what happens in the second clip",
    ),
    "caption both audios": (
        "describe both audios",
        "what is heard in each of the two audios?",
        "write a caption for each recording",
        "summarize the sounds of audio 1 and audio 2",
        "tell me what happens in the first clip and in the second",
    ),
    "explain the difference in few words": (
        "name the difference between the two audios in a few words",
        "briefly, how do the two recordings differ?",
        "in few words, what sets audio 1 apart from audio 2?",
        "give a short answer: what differs between the clips?",
    ),
    "explain the difference in a sentence": (
        "explain the difference between the two audios in one sentence",
        "in a single sentence, how do the two recordings differ?",
        "write one sentence on what sets audio 1 apart from audio 2",
        "compare the two clips in a sentence",
    ),
    "explain the difference in detail": (
        "explain the difference between the two audios in detail",
        "describe at length how the two recordings differ",
        "give a detailed comparison of audio 1 and audio 2",
        "in detail, what distinguishes the two clips?",
    ),
}


def has_phrasings(prompt: str) -> bool:
    """Whether a record's prompt is a placeholder for a family of phrasings."""
    return prompt.strip().lower() in PHRASINGS


def render_question(prompt: str, answer: str, captions: Sequence[str], draw: int | None) -> tuple[str, str]:
    """The texts (prompt, answer) that are tokenized, from those that a record holds.

    `draw` is a non-negative number that picks the phrasing in training, None the first (evaluation). A caption
    placeholder without an answer is answered with the clips' captions. Plain questions are in lower case, as in Mellow.
    """
    placeholder = prompt.strip().lower()
    family = PHRASINGS.get(placeholder)
    if not answer.strip():
        answer = _caption_answer(placeholder, captions)
    if family is None:
        return placeholder, answer.strip().lower()
    return family[0 if draw is None else draw % len(family)], answer.strip()


def _caption_answer(placeholder: str, captions: Sequence[str]) -> str:
    asked = {"caption first audio": (0,), "caption second audio": (1,), "caption both audios": (0, 1)}
    said = {i: captions[i].strip().lower().rstrip(".") for i in asked.get(placeholder, ()) if i < len(captions)}
    return " ".join(f"the audio {i + 1} is {caption}." for i, caption in said.items())


def draw_number(*parts: object) -> int:
    """A number in 0 .. 2**63 - 1 that is a function of `parts` alone: the same on every machine and Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt, without the tokenizer's own begin or end tokens. `tokenizer` is one of transformers."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_answer(tokenizer: Any, text: str) -> list[int]:
    """Ids of an answer, without end-of-text; after a blank, so that its first word is the token it is inside a text."""
    return list(tokenizer(" " + text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class ExampleRow:
    """Where everything of one example stands."""

    input_ids: tuple[int, ...]  # [T]; the separator's id where audio tokens go
    num_answer_tokens: int  # the last so many of them are learned, end-of-text included
    clip_starts: tuple[int, ...]  # position of the first token of each clip


@dataclass(frozen=True)
class Layout:
    """How clips, prompt and answer stand in a row; one for a model."""

    audio_tokens: int  # tokens of a clip
    separator_id: int  # token that stands after each clip; its embedding is the end-of-text token's
    end_id: int  # token that ends an answer
    max_prompt_tokens: int
    max_answer_tokens: int  # end-of-text included
    num_clips: int = (
        0  # clips a row always holds (Mellow's layout: 2, a missing one replaced by a distractor); 0: those there are
    )
    prompt_suffix: tuple[int, ...] = ()  # ids after the prompt (Mellow's layout: blank and end-of-text)
    prompt_pad_id: int | None = (
        None  # Mellow's layout: the prompt is filled up to max_prompt_tokens with this token, attended to
    )

    def prefix(self, num_clips: int, prompt_ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids, clip starts) of everything before the answer."""
        size = self.audio_tokens + 1
        ids = [self.separator_id] * (num_clips * size)
        starts = range(0, num_clips * size, size)
        prompt = list(prompt_ids)[: self.max_prompt_tokens - len(self.prompt_suffix)] + list(self.prompt_suffix)
        if self.prompt_pad_id is not None:
            prompt += [self.prompt_pad_id] * (self.max_prompt_tokens - len(prompt))
        return tuple(ids + prompt), tuple(starts)

    def example(self, num_clips: int, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> ExampleRow:
        """The whole row: prefix, answer, end-of-text; the last two are learned. A cut answer has no end."""
        prefix, starts = self.prefix(num_clips, prompt_ids)
        answer = (*answer_ids, self.end_id)[: self.max_answer_tokens]
        return ExampleRow((*prefix, *answer), len(answer), starts)
