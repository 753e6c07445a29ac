"""The trained tokenizer: whole words, exact return, and the same whatever the order of the corpus."""

import pytest
from transformers import AutoTokenizer

from mellow_ds.model.tokenizer import END_OF_TEXT, train_tokenizer
from mellow_ds.prompt import encode_answer, encode_prompt
from tests.model.conftest import TEXTS

HARD = (
    "b) a siren",
    "a  double blank",
    "tabs\tand\nlines",
    "don't (stop), 12.5 dB - 50%!",
    "na\u00efve caf\u00e9",
    "a_b c",
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXTS, *HARD], 200)


@pytest.mark.parametrize("text", [*TEXTS, *HARD])
def test_a_text_comes_back_exactly(tokenizer, text, tmp_path):
    assert tokenizer.decode(encode_prompt(tokenizer, text)) == text
    assert tokenizer.decode(encode_answer(tokenizer, text)) == text
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.decode(encode_answer(read, text)) == text
    assert encode_answer(read, text) == encode_answer(tokenizer, text)


def test_words_and_marks_are_tokens(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "b) a siren"))
    assert [token.strip("\u2581") for token in tokens] == ["b", ")", "a", "siren"]


def test_a_word_is_one_token_wherever_it_stands(tokenizer):
    alone = encode_prompt(tokenizer, "bell")
    assert encode_answer(tokenizer, "bell") == alone
    assert encode_prompt(tokenizer, "a bell")[-1:] == alone


def test_end_of_text_is_0_and_unknown_words_are_1(tokenizer):
    assert tokenizer.eos_token_id == 0
    assert encode_prompt(tokenizer, END_OF_TEXT) == [0]
    assert encode_prompt(tokenizer, "zebra") == [1]


def test_the_order_of_the_texts_does_not_matter():
    first = train_tokenizer(TEXTS, 40)
    second = train_tokenizer(reversed(TEXTS), 40)
    assert first.get_vocab() == second.get_vocab()


def test_the_most_frequent_words_are_kept():
    tokenizer = train_tokenizer(["bell bell bell rain rain wind"], 4)
    assert len(tokenizer) == 4
    assert encode_prompt(tokenizer, "bell rain wind") == [2, 3, 1]
