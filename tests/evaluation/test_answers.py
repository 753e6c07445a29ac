"""Hand-made cases of what people and small models write, and what may not be read into it."""

import pytest

from mellow_ds.evaluation.answers import (
    Score,
    example_kind,
    read_yes_no,
    score_example,
)

SIREN = "which sound is heard? a) a bell b) a siren c) rain d) the wind"
OPTIONS = {"a": "a bell", "b": "a siren", "c": "rain", "d": "the wind"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("no, there is none", "no"),
        ("yes there is no dog in it", "yes"),
        ("No, it isn't", "no"),
        ("the answer is no", "no"),
        ("I listened, so the answer is: yes.", "yes"),
        ("not sure", None),
        ("I know it", None),
        ("know", None),
        ("nothing", None),
        ("no idea", None),
        ("yes or no", None),
        ("answer yes or no", None),
        ("the answer is yes or no", None),
        ("yes and no", None),
        ("yes, well, no", None),
        ("yes, the answer is no", None),
        ("yesterday", None),
        ("there is no dog", None),
        ("a", None),
        ("", None),
    ],
)
def test_read_yes_no(text: str, wanted: str | None) -> None:
    assert read_yes_no(text) == wanted


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        (SIREN, "b) a siren", "option"),
        (SIREN, "a siren", "option"),
        (SIREN, "thunder", "exact"),  # the answer is no option: the options cannot judge it
        ("is a bell heard? answer yes or no", "Yes.", "yes-no"),
        ("is a bell heard? a) yes b) no", "a) yes", "option"),
        ("is a bell heard?", "no bell at all", "exact"),
        ("which digit is spoken?", "nine", "exact"),
    ],
)
def test_kind_follows_from_question_and_answer(question: str, answer: str, kind: str) -> None:
    assert example_kind(question, answer) == kind


@pytest.mark.parametrize(
    ("question", "answer", "prediction", "score"),
    [
        (SIREN, "b) a siren", "a siren.", Score("option", True, True)),
        (SIREN, "b) a siren", "c", Score("option", False, True)),
        (SIREN, "a) a bell", "hm", Score("option", False, False)),
        ("is it?", "no", "not sure", Score("yes-no", False, False)),
        ("is it?", "no", "No, it is not.", Score("yes-no", True, True)),
        ("is it?", "no", "yes", Score("yes-no", False, True)),
        ("which digit?", "nine", "Nine.", Score("exact", True, True)),
        ("which digit?", "nine", "nine nine", Score("exact", False, True)),
        ("which digit?", "nine", " . ", Score("exact", False, False)),
    ],
)
def test_score_example(question: str, answer: str, prediction: str, score: Score) -> None:
    assert score_example(question, answer, prediction) == score


def test_the_reference_itself_is_always_right(shared_dir) -> None:
    import json

    records = json.loads((shared_dir / "data/fsdd/val.json").read_text())
    kinds = {}
    for record in records:
        score = score_example(record["input"], record["answer"], record["answer"])
        assert score.correct, record
        kinds.setdefault(record["subtype"], set()).add(score.kind)
    assert kinds == {
        "digit-open": {"exact"},
        "caption": {"exact"},
        "difference": {"exact"},
        "digit-mcq": {"option"},
        "speaker-mcq": {"option"},
        "digit-binary": {"yes-no"},
        "same-digit-binary": {"yes-no"},
    }
