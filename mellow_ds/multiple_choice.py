"""Lettered options in the text of a question: found, read from an answer, and shuffled. Plain text, no torch, no files.

`which sound is heard? a) a bell b) a siren` has the options a and b. The same reading serves packing (audit, chance
levels), training (options are shuffled anew each epoch) and scoring.
"""

import math
import re
import unicodedata
from dataclasses import dataclass

# What may stand at the ends of an answer without changing it.
# No hyphen: `-3` is not `3`.
_END_PUNCTUATION = " .,;:!?\"'`*_()[]"
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore),? )?(?:the )?(?:final |correct |right |best )?(?:answer|option|choice)(?: is|:| is:)? "
)
# A letter is an option's mark when a parenthesis or a full stop follows it: `b)`, `(b)`, `b. `.
_OPTION_MARK = re.compile(r"(?<!\S)\(?([a-z])(?:\)\s*|\.\s+)", re.IGNORECASE)
# In a prediction a letter may also stand alone (`b`, `b.`, `b:`), but `a siren` is an article and a noun.
_LETTER_ALONE = re.compile(r"^\(?([a-z])\)?[.:,]?$")
_LETTER_AND_TEXT = re.compile(r"^(?:\(([a-z])\)[.:,]?|([a-z])[).:])\s*(\S.*)$")
_ANSWER_LETTER = re.compile(r"\s*\(?([a-z])(?=[).:,]|\s*$)", re.IGNORECASE)
# Options that speak of the others by place or letter mean something else once they are moved.
_POINTS_AT_OTHERS = re.compile(
    r"\b(?:above|below|both|neither|all of|none of|(?:option|choice)s?|[a-z] (?:and|or) [a-z])\b"
)


@dataclass(frozen=True)
class Option:
    """One lettered option and where it stands in the question."""

    letter: str  # lower case
    text: str  # as it stands in the question, without blanks and separators at its ends
    start: int  # of the text in the question
    end: int


def normalise(text: str) -> str:
    """Lower case, compatibility forms unified (NFKC), one blank between words, no punctuation at the ends.

    Articles, plurals, number words and punctuation inside stay: `a bell` and `bell` are different answers. Leniency
    would only make a score look better than the answers are.
    """
    unified = unicodedata.normalize("NFKC", text).lower()
    return " ".join(unified.split()).strip(_END_PUNCTUATION)


def find_options(question: str) -> tuple[Option, ...]:
    """The options of a question, in its order; empty where there are not at least two, each with a text.

    Marks are `a)`, `(a)` or `a. `, in alphabetical order from `a`. Where `a)` occurs more than once, the last one from
    which a chain starts counts, since options stand at the end.
    """
    marks = list(_OPTION_MARK.finditer(question))
    for first in reversed(range(len(marks))):
        if marks[first][1].lower() != "a":
            continue
        chain = [marks[first]]
        for mark in marks[first + 1 :]:
            if ord(mark[1].lower()) == ord(chain[-1][1].lower()) + 1:
                chain.append(mark)
        ends = [mark.start() for mark in chain[1:]] + [len(question)]
        options = tuple(_option(question, mark, end) for mark, end in zip(chain, ends, strict=True))
        if len(options) >= 2 and all(normalise(option.text) for option in options):
            return options
    return ()


def parse_options(question: str) -> dict[str, str]:
    """The options of a question as letter -> normalised text (see `find_options`)."""
    return {option.letter: normalise(option.text) for option in find_options(question)}


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


def shuffle_options(question: str, answer: str, draw: int) -> tuple[str, str]:
    """(question, answer) with the texts of the options in another order and the letter of the answer rewritten.

    `draw`, a non-negative number, picks one of the n! orders. Both come back unchanged where there are no options,
    where the answer does not name one of them, and where an option speaks of others (`all of the above`, `a and b`).
    """
    options = find_options(question)
    right = read_option(answer, {option.letter: normalise(option.text) for option in options}) if options else None
    if right is None or any(_POINTS_AT_OTHERS.search(option.text.lower()) for option in options):
        return question, answer
    order = _nth_order(len(options), draw)
    parts, last = [], 0
    for option, source in zip(options, order, strict=True):
        parts += [question[last : option.start], options[source].text]
        last = option.end
    moved_to = order.index(ord(right) - ord("a"))
    return "".join(parts) + question[last:], _with_letter(answer, right, options[moved_to].letter)


def _option(question: str, mark: re.Match[str], end: int) -> Option:
    text = question[mark.end() : end]
    kept = text.rstrip(",; \t\r\n")
    return Option(mark[1].lower(), kept, mark.end(), mark.end() + len(kept))


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


def _nth_order(size: int, draw: int) -> list[int]:
    """The order of 0 .. size - 1 that has the number `draw` (modulo size!) in the factorial number system."""
    left, order = list(range(size)), []
    draw %= math.factorial(size)
    for remaining in range(size, 0, -1):
        place, draw = divmod(draw, math.factorial(remaining - 1))
        order.append(left.pop(place))
    return order


def _with_letter(answer: str, old: str, new: str) -> str:
    """`answer` with its leading letter `old` replaced; unchanged where it names the option by its text alone."""
    lead = _LEAD_IN.match(answer.lower())
    start = lead.end() if lead else 0
    found = _ANSWER_LETTER.match(answer, start)
    if found is None or found[1].lower() != old:
        return answer
    letter = new.upper() if found[1].isupper() else new
    return answer[: found.start(1)] + letter + answer[found.end(1) :]
