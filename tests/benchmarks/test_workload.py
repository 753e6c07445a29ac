"""Shares and lengths of the drawn examples against ReasonAQA's counts."""

import pytest
from workload import END_ID, FAMILIES, PAD_ID, batches, clips_of, describe, draw_examples


def test_the_families_hold_every_question_of_the_train_split():
    assert sum(family.num_questions for family in FAMILIES) == 968_071
    assert sum(family.num_questions for family in FAMILIES if family.num_clips == 2) == 57_585 + 145_980


@pytest.mark.parametrize("count", [1, 8, 20, 333])
def test_families_stand_in_their_shares_to_within_one_example(count):
    examples = draw_examples(count, seed=4, vocab_size=49_152)
    assert len(examples) == count
    for family in FAMILIES:
        found = sum(example.family == family.name for example in examples)
        assert abs(found - count * family.num_questions / 968_071) <= 1


def test_lengths_keep_to_their_ranges_and_ids_clear_of_the_special_ones():
    examples = draw_examples(400, seed=0, vocab_size=400)
    of = {family.name: family for family in FAMILIES}
    for example in examples:
        family = of[example.family]
        assert family.prompt_tokens[0] <= len(example.prompt_ids) <= family.prompt_tokens[1]
        assert family.answer_tokens[0] <= len(example.answer_ids) + 1 <= family.answer_tokens[1]
        assert not {END_ID, PAD_ID} & {*example.prompt_ids, *example.answer_ids}
        assert max(*example.prompt_ids, *example.answer_ids) < 400


def test_a_seed_gives_the_same_examples_and_another_others():
    assert draw_examples(9, 1, 500) == draw_examples(9, 1, 500) != draw_examples(9, 2, 500)


def test_batches_take_all_examples_in_order():
    examples = draw_examples(7, 0, 500)
    parts = list(batches(examples, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert [example for part in parts for example in part] == examples


def test_every_example_has_two_places_for_clips():
    assert clips_of(0, 2) + clips_of(1, 2) == [0, 1, 2, 3]
    assert clips_of(3, 1) == [6]


def test_the_description_counts_what_was_drawn():
    examples = draw_examples(20, 0, 500)
    described = describe(examples)
    assert sum(family["examples_drawn"] for family in described["families"]) == described["examples"] == 20
    assert described["with_two_clips"] == sum(example.num_clips == 2 for example in examples) == 4
    mean, median, most = described["prompt_tokens_mean_median_most"]
    lengths = sorted(len(example.prompt_ids) for example in examples)
    assert (median, most) == (lengths[10], lengths[-1])
    assert mean == pytest.approx(sum(lengths) / 20, abs=0.05)
