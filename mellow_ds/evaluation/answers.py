"""Reading free text as an answer, and scoring it: plain text in, right or wrong out. No torch, no files.

How an example is scored follows from its question and its answer alone:

- options in the question (`which? a) x b) y`) of which the answer is one: `option`, the prediction must name it too;
- the answer is `yes` or `no`: `yes-no`, the prediction must say the same;
- all others: `exact`, the texts must be equal after `normalise`.

A prediction that cannot be read as an answer of its kind is wrong and counted as unreadable, never taken for a guess.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from mellow_ds.multiple_choice import normalise, parse_options, read_option

Kind = Literal["option", "yes-no", "exact"]
KINDS: tuple[Kind, ...] = ("option", "yes-no", "exact")

_STATED_YES_NO = re.compile(r"\banswer(?: is|:| is:)? (yes|no)\b(?!,? (?:or|and|nor)\b)")
# `no idea` is a refusal; `yes or no` repeats the question.
_NOT_AN_ANSWER_AFTER_NO = {"idea", "clue", "answer", "opinion", "information", "way"}
_ECHO_AFTER_YES_NO = {"or", "and", "nor", "yes", "no"}


@dataclass(frozen=True)
class Score:
    """What a prediction is worth."""

    kind: Kind
    correct: bool
    readable: bool  # could be read as an answer of its kind; False implies not correct


def read_yes_no(text: str) -> str | None:
    """`yes` or `no` where `text` says one of them clearly, else None.

    It does when its first word is one (`no, there is none`) or when it states it (`the answer is no`). Only whole words
    count, so `not sure` and `know` hold no `no`; `no idea`, `yes or no` and contradictions are unreadable.
    """
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", unicodedata.normalize("NFKC", text).lower())
    if not words:
        return None
    stated = set(_STATED_YES_NO.findall(" ".join(text.lower().split())))
    if len(stated) == 1:
        said = stated.pop()
        return said if words[0] not in ("yes", "no") or words[0] == said else None
    if stated or words[0] not in ("yes", "no"):
        return None
    first, rest = words[0], words[1:]
    if rest and (rest[0] in _ECHO_AFTER_YES_NO or (first == "no" and rest[0] in _NOT_AN_ANSWER_AFTER_NO)):
        return None
    if rest and rest[-1] in ("yes", "no") and rest[-1] != first:
        return None
    return first


def example_kind(question: str, answer: str) -> Kind:
    """How an example is scored; a function of its question and its answer alone."""
    options = parse_options(question)
    if options and read_option(answer, options) is not None:
        return "option"
    if normalise(answer) in ("yes", "no"):
        return "yes-no"
    return "exact"


def score_example(question: str, answer: str, prediction: str) -> Score:
    """Score one prediction; `question` and `answer` as they were rendered for the model."""
    kind = example_kind(question, answer)
    wanted: str | None
    said: str | None
    if kind == "option":
        options = parse_options(question)
        wanted, said = read_option(answer, options), read_option(prediction, options)
    elif kind == "yes-no":
        wanted, said = normalise(answer), read_yes_no(prediction)
    else:
        wanted, said = normalise(answer), normalise(prediction) or None
    return Score(kind, correct=said is not None and said == wanted, readable=said is not None)
