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

Kind = Literal["option", "yes-no", "exact"]
KINDS: tuple[Kind, ...] = ("option", "yes-no", "exact")

# What may stand at the ends of an answer without changing it.
# No hyphen: `-3` is not `3`.
_END_PUNCTUATION = " .,;:!?\"'`*_()[]"
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore),? )?(?:the )?(?:final |correct |right |best )?(?:answer|option|choice)(?: is|:| is:)? "
)
# A letter is an option's mark when a parenthesis follows it: `b)`, `(b)`.
_OPTION_MARK = re.compile(r"(?<!\S)\(?([a-z])\)\s*")
# In a prediction a letter may also stand alone (`b`, `b.`, `b:`), but `a siren` is an article and a noun.
_LETTER_ALONE = re.compile(r"^\(?([a-z])\)?[.:,]?$")
_LETTER_AND_TEXT = re.compile(r"^(?:\(([a-z])\)[.:,]?|([a-z])[).:])\s*(\S.*)$")

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


def normalise(text: str) -> str:
    """Lower case, compatibility forms unified (NFKC), one blank between words, no punctuation at the ends.

    Articles, plurals, number words and punctuation inside stay: `a bell` and `bell` are different answers. Leniency
    would only make a score look better than the answers are.
    """
    unified = unicodedata.normalize("NFKC", text).lower()
    return " ".join(unified.split()).strip(_END_PUNCTUATION)


def parse_options(question: str) -> dict[str, str]:
    """The options `a) x b) y ...` in a question, as letter -> normalised text; empty where there are not at least two.

    Marks are `a)` or `(a)`, in alphabetical order from `a`. Where `a)` occurs more than once, the last one from which
    a chain starts counts, since options stand at the end.
    """
    line = " ".join(question.lower().split())
    marks = list(_OPTION_MARK.finditer(line))
    for first in reversed(range(len(marks))):
        if marks[first][1] != "a":
            continue
        chain = [marks[first]]
        for mark in marks[first + 1 :]:
            if ord(mark[1]) == ord(chain[-1][1]) + 1:
                chain.append(mark)
        ends = [mark.start() for mark in chain[1:]] + [len(line)]
        options = {
            mark[1]: normalise(line[mark.end() : end].rstrip(",; ")) for mark, end in zip(chain, ends, strict=True)
        }
        if len(options) >= 2 and all(options.values()):
            return options
    return {}


def read_option(text: str, options: dict[str, str]) -> str | None:
    """The letter that `text` names among `options`, or None where it names none, or more than one.

    Read are a letter alone (`b`, `b.`, `(b)`), a letter with text (`b) a siren`, `b: a siren`), an option's text alone
    where it is the text of exactly one option, each also after `the answer is`, `option` and the like. A letter
    that contradicts its text (the text is another option's) is unreadable; where the text is no option's (cut short, or
    in other words) the letter counts. A text with marks of several options is unreadable.
    """
    named = _options_with_text(text, options)
    if len(named) == 1:
        return named[0]
    line = _LEAD_IN.sub("", " ".join(unicodedata.normalize("NFKC", text).lower().split()))
    alone = _LETTER_ALONE.match(line)
    if alone:
        return alone[1] if alone[1] in options else None
    with_text = _LETTER_AND_TEXT.match(line)
    if with_text:
        letter, rest = with_text[1] or with_text[2], with_text[3]
        return _letter_with_text(letter, rest, options)
    named = _options_with_text(line, options)
    return named[0] if len(named) == 1 else None


def _options_with_text(text: str, options: dict[str, str]) -> list[str]:
    wanted = normalise(text)
    return [letter for letter, option in options.items() if option == wanted]


def _letter_with_text(letter: str, rest: str, options: dict[str, str]) -> str | None:
    if letter not in options:
        return None
    named = _options_with_text(rest, options)
    if named:
        return letter if letter in named else None
    if any(mark[1] in options and mark[1] != letter for mark in _OPTION_MARK.finditer(rest)):
        return None
    return letter


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
