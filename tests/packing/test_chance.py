"""Chance levels of hand-made records."""

import json

import pytest

from mellow_ds.packing.chance import chance_levels


def record(subtype: str, question: str, answer: str, **more: str) -> dict[str, str]:
    return {"subtype": subtype, "input": question, "answer": answer, **more}


def test_options_give_one_over_their_number():
    records = [record("m", "which? a) x b) y c) z d) w", f"{letter}) it") for letter in "abcd"]
    records += [record("m2", "which? a) x b) y", f"{letter}) it") for letter in "ab"]
    assert chance_levels(records) == {"m": 0.25, "m2": 0.5}


def test_questions_with_different_numbers_of_options_are_averaged():
    records = [record("m", "which? a) x b) y", "b) y"), record("m", "which? a) x b) y c) z d) w", "a) x")]
    assert chance_levels(records) == {"m": pytest.approx((1 / 2 + 1 / 4) / 2)}


def test_a_letter_that_is_right_too_often_is_what_a_reader_would_say():
    records = [record("m", "which? a) x b) y c) z d) w", "b) y" if i % 4 else "a) x") for i in range(20)]
    assert chance_levels(records) == {"m": 0.75}


def test_a_letter_that_leads_by_luck_is_no_bias():
    answers = ["a) x"] * 30 + ["b) y"] * 38 + ["c) z"] * 27 + ["d) w"] * 25  # b: 2 standard deviations over 30
    assert chance_levels([record("m", "which? a) x b) y c) z d) w", answer) for answer in answers]) == {"m": 0.25}


def test_questions_with_and_without_options_under_one_subtype_are_guessed_apart():
    records = [record("x", "which? a) x b) y", f"{letter}) it") for letter in "abab"]
    records += [record("x", "what?", answer) for answer in ("one", "one", "one", "two")]
    assert chance_levels(records) == {"x": pytest.approx((2 + 3) / 8)}


def test_options_without_a_letter_in_the_answer_still_count():
    records = [record("m", "which? a) x b) y c) z d) w", "a long answer") for _ in range(8)]
    assert chance_levels(records) == {"m": 0.25}


def test_closed_and_open_answers_give_the_share_of_the_most_frequent():
    records = [record("b", f"is {i} heard? answer yes or no", "yes" if i < 7 else "no") for i in range(10)]
    records += [record("o", "what?", answer) for answer in ("one", "One ", "two", "three")]
    assert chance_levels(records) == {"b": 0.7, "o": 0.5}


def test_a_caption_without_an_answer_is_its_captions():
    records = [
        record("c", "caption first audio", "", caption1=caption, caption2="") for caption in ("dog", "dog.", "cat")
    ]
    assert chance_levels(records) == {"c": pytest.approx(2 / 3)}


def test_subtypes_are_sorted_and_none_give_none():
    assert list(chance_levels([record("b", "?", "x"), record("a", "?", "x")])) == ["a", "b"]
    assert chance_levels([]) == {}


def test_real_speech_records(shared_dir):
    records = json.loads((shared_dir / "data" / "fsdd" / "train.json").read_text(encoding="utf-8"))
    levels = chance_levels(records)
    assert levels["digit-open"] == pytest.approx(0.1, abs=0.02)
    assert levels["digit-mcq"] == pytest.approx(0.25, abs=0.03)
    assert levels["digit-binary"] == pytest.approx(0.5, abs=0.05)
