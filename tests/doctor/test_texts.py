"""Lengths of rows by hand, with a tokenizer of characters."""

from dataclasses import replace

import pytest

from mellow_ds.config.load import load_run_config
from mellow_ds.config.schema import RunConfig
from mellow_ds.data.reader import ShardReader
from mellow_ds.doctor.texts import sample_questions, text_facts
from mellow_ds.shard_format import Question
from tests.data.made_shards import RATE, CharTokenizer, simple_clips, write_shards

QUESTIONS = [
    Question("1", ("a",), "what?", "cat", "s"),  # 5 letters; a blank, 3 letters and the end: 5
    Question("2", ("a", "b"), "which one is it?", "the second", "s"),  # 16; 12
]


def config(**data: int) -> RunConfig:
    run = load_run_config("quickstart")
    return replace(run, data=replace(run.data, **data))


def test_lengths_by_hand() -> None:
    facts = text_facts(QUESTIONS, config(ip_text_len=64, op_text_len=32), 4, CharTokenizer())
    assert facts is not None
    assert (facts.longest_prompt, facts.longest_answer) == (16, 12)
    assert (facts.num_cut_prompts, facts.num_cut_answers) == (0, 0)
    # clips take 4 tokens and a separator each
    assert (facts.mean_row, facts.longest_row) == ((5 + 5 + 5 + 10 + 16 + 12) / 2, 38)
    assert (facts.mean_answer, facts.mean_clips) == (8.5, 1.5)
    assert not facts.is_estimate


def test_what_is_cut_is_counted_and_not_in_the_row() -> None:
    facts = text_facts(QUESTIONS, config(ip_text_len=10, op_text_len=6), 4, CharTokenizer())
    assert facts is not None
    assert (facts.num_cut_prompts, facts.num_cut_answers) == (1, 1)
    assert facts.longest_row == 10 + 10 + 6


def test_layout_mellow_pads_and_always_has_two_clips() -> None:
    run = config(ip_text_len=40, op_text_len=32)
    run = replace(run, model=replace(run.model, layout="mellow"))
    facts = text_facts(QUESTIONS, run, 4, CharTokenizer())
    assert facts is not None
    assert facts.longest_row == 2 * 5 + 40 + 12
    assert facts.mean_clips == 2


def test_without_a_tokenizer_lengths_are_estimated() -> None:
    facts = text_facts(QUESTIONS, config(), 4, None)
    assert facts is not None
    assert facts.is_estimate
    assert facts.longest_prompt == 5  # 16 letters over 3.5
    assert text_facts([], config(), 4, None) is None


@pytest.mark.parametrize("num_shards", [1, 3, 20])
def test_the_sample_is_spread_over_shards(tmp_path, num_shards: int) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(number, 6, questions_each=3) for number in range(num_shards)])
    reader = ShardReader([folder], RATE)
    everything = sample_questions(reader, 10_000)
    assert len(everything) == min(num_shards, 8) * 18
    few = sample_questions(reader, 16)
    assert len({question.id for question in few}) == len(few)
    assert 16 <= len(few) <= 16 + 8
    reader.close()
