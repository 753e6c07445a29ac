"""Named streams are independent and repeatable; balanced draws are balanced."""

from collections import Counter

from mellow_ds.packing.synthesis.draws import balanced_choice, log_uniform, stream


def test_a_stream_is_a_function_of_its_whole_key():
    assert stream(1, "train", 2).random(4).tolist() == stream(1, "train", 2).random(4).tolist()
    firsts = {
        float(stream(*key).random()) for key in ((1, "train", 2), (1, "train", 3), (1, "val", 2), (2, "train", 2))
    }
    assert len(firsts) == 4
    assert stream(1, 23).random() != stream(12, 3).random()  # the parts are kept apart


def test_balanced_choices_hold_each_choice_once_a_block():
    drawn = [balanced_choice("abcd", position, "letters", 7) for position in range(402)]
    assert all(sorted(drawn[start : start + 4]) == list("abcd") for start in range(0, 400, 4))
    assert max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 1
    blocks = {"".join(drawn[start : start + 4]) for start in range(0, 400, 4)}
    assert len(blocks) > 15  # of 24 orders: the next letter does not follow from the one before


def test_log_uniform_stays_within_and_halves_at_the_geometric_mean():
    rng = stream("log-uniform test")
    drawn = [log_uniform(rng, (100.0, 900.0)) for _ in range(2000)]
    assert min(drawn) >= 100
    assert max(drawn) <= 900
    assert 900 < sum(value < 300 for value in drawn) < 1100
