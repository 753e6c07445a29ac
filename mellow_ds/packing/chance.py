"""What someone scores who reads the questions and does not listen: the level that accuracies are compared with."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mellow_ds.multiple_choice import find_options
from mellow_ds.prompt import render_question

_ANSWER_LETTER = re.compile(r"\(?([a-z])[).](?:\s|$)")


def chance_levels(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Exact-match accuracy (0 to 1) by `subtype` of the best answer that is the same for every question.

    Questions with lettered options: one over the number of options; where one letter is right far more often than that
    (in ReasonAQA "b" is, more often than all others together), its share. All others: the share of the most frequent
    answer, blanks and case aside. A caption placeholder without an answer counts with its captions.
    Records are those of a JSON file: `input`, `answer`, `subtype`, and `caption1`, `caption2` where there are any.
    """
    by_subtype: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_subtype[str(record.get("subtype", ""))].append(record)
    return {subtype: _best_constant(by_subtype[subtype]) for subtype in sorted(by_subtype)}


def _best_constant(records: list[Mapping[str, Any]]) -> float:
    """Share of right answers that is to be expected; questions with and without options are guessed apart."""
    letters: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    expected_right = 0.0
    for record in records:
        question, answer = _texts(record)
        options = len(find_options(question))
        if options:
            letter = _ANSWER_LETTER.match(answer)
            letters[letter.group(1) if letter else ""] += 1
            expected_right += 1 / options
        else:
            answers[" ".join(answer.split())] += 1
    del letters[""]
    num_lettered = len(records) - sum(answers.values())
    most_frequent = max(letters.values(), default=0)
    # three standard deviations: the best letter of a hundred evenly drawn ones is no way to score 30 percent
    variance = expected_right * (1 - expected_right / num_lettered) if num_lettered else 0.0
    if most_frequent > expected_right + 3 * variance**0.5:
        expected_right = most_frequent
    return (expected_right + max(answers.values(), default=0)) / len(records)


def _texts(record: Mapping[str, Any]) -> tuple[str, str]:
    captions = [str(record.get(f"caption{i}", "")) for i in (1, 2)]
    question, answer = render_question(str(record.get("input", "")), str(record.get("answer", "")), captions, None)
    return question.lower(), answer.lower()
