"""Hand-made cases of what people and small models write, and what may not be read into it."""

import pytest

from mellow_ds.evaluation.answers import (
    Score,
    example_kind,
    normalise,
    parse_options,
    read_option,
    read_yes_no,
    score_example,
)

SIREN = "which sound is heard? a) a bell b) a siren c) rain d) the wind"
OPTIONS = {"a": "a bell", "b": "a siren", "c": "rain", "d": "the wind"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Seven", "seven"),
        ("  seven. ", "seven"),
        ("'A  Siren!'", "a siren"),
        ("it's a dog's bark", "it's a dog's bark"),
        ("-3", "-3"),
        ("3.5", "3.5"),
        ("\uff33even", "seven"),  # full-width S
        ("...", ""),
    ],
)
def test_normalise(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


def test_normalise_keeps_articles_and_plurals() -> None:
    assert len({normalise(text) for text in ("bell", "a bell", "the bell", "bells")}) == 4


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        (SIREN, OPTIONS),
        ("which one? (a) one (b) two", {"a": "one", "b": "two"}),
        ("Which?\nA) One,\nB) Two;", {"a": "one", "b": "two"}),
        ("which digit (a) or b? a) six b) zero c) one d) seven", {"a": "six", "b": "zero", "c": "one", "d": "seven"}),
        ("which digit is spoken?", {}),
        ("is f(a) a function?", {}),
        ("which? a) only one", {}),
        ("which? b) no c) start", {}),
        ("which? a) b) c)", {}),
    ],
)
def test_parse_options(question: str, wanted: dict[str, str]) -> None:
    assert parse_options(question) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("b) a siren", "b"),
        ("(b) a siren", "b"),
        ("B) A siren.", "b"),
        ("(b)", "b"),
        ("b)", "b"),
        ("b", "b"),
        ("b.", "b"),
        ("b. a siren", "b"),
        ("b: a siren", "b"),
        ("a siren", "b"),  # an article, not option a
        ("a bell", "a"),
        ("rain", "c"),
        ("The answer is b) a siren", "b"),
        ("answer: (d)", "d"),
        ("option c", "c"),
        ("b) a police siren", "b"),  # no option's text: the letter counts
        ("b) a sir", "b"),  # cut short
        ("a) a siren", None),  # the letter contradicts the text
        ("siren", None),  # no option's text: articles count
        ("e) a dog", None),
        ("e", None),
        ("a) a bell b) a siren c) rain d) the wind", None),  # the question repeated
        ("b) or c) rain", None),
        ("a dog", None),
        ("i am not sure", None),
        ("", None),
        ("bell", None),
        ("ab", None),
    ],
)
def test_read_option(text: str, wanted: str | None) -> None:
    assert read_option(text, OPTIONS) == wanted


def test_text_of_two_options_names_neither() -> None:
    options = {"a": "six", "b": "six", "c": "one"}
    assert read_option("six", options) is None
    assert read_option("b) six", options) == "b"


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
