"""Summaries against hand counts and published intervals."""

import pytest

from mellow_ds.evaluation.predictions import Prediction, score_prediction
from mellow_ds.evaluation.results import format_results, summarise, wilson_interval
from tests.guide import quoted


@pytest.mark.parametrize(
    ("num_correct", "num_examples", "low", "high"),
    [
        # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17 (1998), table I,
        # method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),  # the mirror of the third
    ],
)
def test_wilson_interval_as_published(num_correct: int, num_examples: int, low: float, high: float) -> None:
    assert wilson_interval(num_correct, num_examples) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_solves_its_equation() -> None:
    """Its ends are the proportions p at which the observed share lies 1.96 standard errors of p away."""
    for end in wilson_interval(7, 30):
        assert abs(7 / 30 - end) / (end * (1 - end) / 30) ** 0.5 == pytest.approx(1.959964, abs=1e-6)


def _predictions() -> list[Prediction]:
    options = "which? a) x b) y c) z d) w"
    said = [
        ("mcq", options, "a) x", "a"),
        ("mcq", options, "b) y", "a"),
        ("mcq", options, "b) y", "no idea"),
        ("mcq", options, "b) y", "b) y"),
        ("binary", "is it?", "no", "not sure"),
        ("binary", "is it?", "no", "no"),
        ("open", "what?", "a horn", "A horn."),
        ("open", "what?", "rain", "wind"),
        ("open", "what?", "rain", ""),
    ]
    return [score_prediction(f"{i:02d}", s, ("c",), q, a, p, i != 7) for i, (s, q, a, p) in enumerate(said)]


def test_summarise_counts() -> None:
    results = summarise(_predictions())
    mcq, binary, open_ = (results["by_subtype"][name] for name in ("mcq", "binary", "open"))
    assert (mcq["kind"], mcq["n"], mcq["num_correct"], mcq["unreadable"]) == ("option", 4, 2, 1)
    assert (binary["kind"], binary["n"], binary["num_correct"], binary["unreadable"]) == ("yes-no", 2, 1, 1)
    assert (open_["kind"], open_["n"], open_["num_correct"], open_["unreadable"]) == ("exact", 3, 1, 1)
    assert open_["unfinished"] == 1
    assert mcq["accuracy"] == 0.5
    assert mcq["chance"] == 0.25  # one of four options
    assert binary["chance"] == 1.0
    assert open_["chance"] == pytest.approx(2 / 3)
    assert results["overall"]["num_correct"] == 4
    assert results["num_examples"] == results["overall"]["n"] == 9
    assert {kind: entry["n"] for kind, entry in results["by_kind"].items()} == {"option": 4, "yes-no": 2, "exact": 3}


def test_a_subtype_of_several_kinds_says_so() -> None:
    mixed = [
        score_prediction("0", "s", (), "is it?", "yes", "yes"),
        score_prediction("1", "s", (), "what?", "rain", "rain"),
    ]
    assert summarise(mixed)["by_subtype"]["s"]["kind"] == "yes-no+exact"


def test_nothing_to_summarise() -> None:
    results = summarise([])
    assert results["overall"]["accuracy"] is None
    assert "-" in format_results(results)


def test_table() -> None:
    predictions = _predictions()
    results = {**summarise(predictions), "silenced": summarise(predictions[:4]), "captions": {}}
    *lines, _ = format_results(results).splitlines()
    assert lines[0].split()[:3] == ["subtype", "scored", "by"]
    (mcq,) = (line for line in lines if line.startswith("mcq"))
    assert mcq.split() == ["mcq", "option", "4", "50.0", "15.0", "..", "85.0", "25.0", "50.0", "1"]
    (binary,) = (line for line in lines if line.startswith("binary"))
    assert binary.split()[-2:] == ["-", "1"]
    assert len({len(line) for line in lines}) == 1


def test_answers_that_do_not_depend_on_audio_are_remarked() -> None:
    heard = _predictions()
    words = quoted("is as high as with audio")
    same = format_results({**summarise(heard), "silenced": summarise(heard)})
    assert words in same.splitlines()[-1]
    right, wrong = [p for p in heard if p.correct][:1] * 50, [p for p in heard if not p.correct][:1] * 50
    assert words not in format_results({**summarise(right), "silenced": summarise(wrong)})
    assert words in format_results({**summarise(wrong), "silenced": summarise(right)})


def test_table_without_silenced_and_with_captions() -> None:
    captions = {
        "caption": {
            "num_items": 3,
            "num_references": 5,
            "tokenizer": "plain",
            "scores": {"BLEU-1": 0.5, "METEOR": None},
            "reasons": {"METEOR": "no java on this machine"},
        }
    }
    text = format_results({**summarise(_predictions()), "silenced": None, "captions": captions})
    assert "silenced" not in text
    assert "BLEU-1 0.500" in text
    assert "3 items, 5 references, plain tokens" in text
    assert "no METEOR: no java on this machine" in text
