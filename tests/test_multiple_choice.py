"""Hand-made questions with options, what answers name of them, and shuffling against a plain restatement."""

import itertools

import pytest

from mellow_ds.multiple_choice import find_options, normalise, parse_options, read_option, shuffle_options

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
        ("which one? a. a dog b. a cat", {"a": "a dog", "b": "a cat"}),
        ("what does section a) say?", {}),
        ("which plan? a) plan b) plan c) none", {"a": "plan", "b": "plan", "c": "none"}),
        ("choose: a) one b) two d) four", {"a": "one", "b": "two d) four"}),
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


def test_options_stand_where_they_say() -> None:
    question = "Which?\nA) One,\n(B)  Two;"
    for option, text in zip(find_options(question), ("One", "Two"), strict=True):
        assert question[option.start : option.end] == option.text == text


def test_every_order_comes_up_once_in_n_factorial_draws() -> None:
    shuffled = {shuffle_options(SIREN, "b) a siren", draw)[0] for draw in range(24)}
    wanted = {
        "which sound is heard? " + " ".join(f"{letter}) {text}" for letter, text in zip("abcd", order, strict=True))
        for order in itertools.permutations(OPTIONS.values())
    }
    assert shuffled == wanted


@pytest.mark.parametrize(
    "answer", ["b) a siren", "(b) a siren", "b", "B.", "a siren", "The answer is b) a siren", "b:"]
)
def test_the_answer_names_the_same_text_after_shuffling(answer: str) -> None:
    for draw in range(0, 240, 7):
        question, moved = shuffle_options(SIREN, answer, draw)
        options = parse_options(question)
        letter = read_option(moved, options)
        assert letter is not None
        assert options[letter] == "a siren"
        assert sorted(options.values()) == sorted(OPTIONS.values())


def test_right_letters_are_even_over_the_orders() -> None:
    letters = [shuffle_options(SIREN, "b) a siren", draw)[1][0] for draw in range(24)]
    assert {letter: letters.count(letter) for letter in "abcd"} == dict.fromkeys("abcd", 6)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what is heard?", "a dog"),
        (SIREN, "a police car"),  # names no option
        ("which? a) a dog b) a cat c) all of the above", "c) all of the above"),
        ("which? a) a dog b) a cat c) both a and b", "a) a dog"),
        ("which? a) a dog b) a cat c) neither", "c)"),
    ],
)
def test_what_would_change_its_meaning_is_left_alone(question: str, answer: str) -> None:
    assert {shuffle_options(question, answer, draw) for draw in range(6)} == {(question, answer)}


def test_separators_and_marks_stay_in_their_places() -> None:
    question, answer = shuffle_options("Which?\n(A) One,\n(B) Two; ", "(A) One", 1)
    assert (question, answer) == ("Which?\n(A) Two,\n(B) One; ", "(B) One")
