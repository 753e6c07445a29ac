"""Every answer follows from the scene, and nothing of it from the text."""

import re
from collections import Counter, defaultdict

import pytest

from mellow_ds.packing.chance import chance_levels
from mellow_ds.packing.synthesis.events import NAMES
from mellow_ds.packing.synthesis.questions import PLACES, clip_path, make_records
from mellow_ds.packing.synthesis.scenes import ALONE, SEQUENCE, TOGETHER, draw_scenes

FIELDS = ["taskname", "filepath1", "filepath2", "caption1", "caption2", "input", "answer", "subtype"]
SUBTYPES = {
    "event-open",
    "event-mcq",
    "event-binary",
    "count-open",
    "order-mcq",
    "caption",
    "entailment",
    "same-binary",
    "difference",
}


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(3, "train", 480)


@pytest.fixture(scope="module")
def records(scenes):
    return make_records(scenes, 3, "flac")


@pytest.fixture(scope="module")
def scene_of(scenes):
    return {clip_path(scene, "flac"): scene for scene in scenes}


def of(records, subtype):
    return [record for record in records if record["subtype"] == subtype]


def options_of(record) -> dict[str, str]:
    """Letter to option, read from the text."""
    parts = re.split(r" ([a-z])\) ", record["input"])[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_records_have_the_fields_of_reasonaqa_and_the_captions_of_their_clips(records, scene_of):
    for record in records:
        assert list(record) == FIELDS
        assert all(isinstance(value, str) for value in record.values())
        assert record["caption1"] == scene_of[record["filepath1"]].caption
        assert record["caption2"] == (scene_of[record["filepath2"]].caption if record["filepath2"] else "")
        assert "\\" not in record["filepath1"] + record["filepath2"]
        assert record["input"] == record["input"].lower()
        assert record["answer"]
    assert {record["subtype"] for record in records} == SUBTYPES
    assert min(Counter(record["filepath1"] for record in records).values()) >= 5
    assert len({tuple(record.values()) for record in records}) == len(records)


def test_open_questions_and_captions(records, scene_of):
    for record in of(records, "event-open"):
        assert scene_of[record["filepath1"]].names == (record["answer"],)
    for record in of(records, "caption"):
        assert record["answer"] == scene_of[record["filepath1"]].caption
    counts = of(records, "count-open")
    for record in counts:
        assert record["answer"] == {1: "one", 2: "two"}[len(scene_of[record["filepath1"]].placed)]
    assert Counter(record["answer"] for record in counts) == {"one": 240, "two": 240}
    for subtype in ("event-open", "caption", "count-open", "same-binary", "difference"):
        assert len({record["input"] for record in of(records, subtype)}) == 1


def test_the_right_option_is_the_only_one_that_is_heard(records, scene_of):
    for record in of(records, "event-mcq"):
        options = options_of(record)
        assert list(options) == list("abcd")
        assert len(set(options.values())) == 4
        letter, _, name = record["answer"].partition(") ")
        assert options[letter] == name
        assert [option for option in options.values() if option in scene_of[record["filepath1"]].names] == [name]


def test_order_offers_both_sounds_and_wants_the_right_end(records, scene_of):
    ends = Counter()
    for record in of(records, "order-mcq"):
        scene, options = scene_of[record["filepath1"]], options_of(record)
        assert scene.arrangement == SEQUENCE
        assert set(scene.names) < set(options.values())
        by_onset = [p.event.name for p in sorted(scene.placed, key=lambda placed: placed.onset_seconds)]
        asked = re.match(r"which sound comes (first|last)\?", record["input"]).group(1)
        letter, _, name = record["answer"].partition(") ")
        assert options[letter] == name == by_onset[0 if asked == "first" else -1]
        ends[asked] += 1
    assert ends == {"first": 60, "last": 60}


@pytest.mark.parametrize("subtype", ["event-mcq", "order-mcq"])
def test_letters_are_balanced_and_every_name_is_right_somewhere(records, subtype):
    letters = [record["answer"][0] for record in of(records, subtype)]
    assert max(Counter(letters).values()) - min(Counter(letters).values()) <= 1
    right = [options_of(record)[record["answer"][0]] for record in of(records, subtype)]
    assert set(right) == set(NAMES)


def test_yes_and_no(records, scene_of):
    asked = of(records, "event-binary")
    for record in asked:
        name = re.fullmatch(r"is (.+) heard\? answer yes or no", record["input"]).group(1)
        assert name in NAMES
        assert record["answer"] == ("yes" if name in scene_of[record["filepath1"]].names else "no")
    assert Counter(record["answer"] for record in asked) == {"yes": 240, "no": 240}
    same = of(records, "same-binary")
    for record in same:
        first, second = scene_of[record["filepath1"]], scene_of[record["filepath2"]]
        assert first is not second
        assert record["answer"] == ("yes" if first.names == second.names else "no")
    assert Counter(record["answer"] for record in same) == {"yes": 120, "no": 120}


def test_differences_name_both_clips(records, scene_of):
    for record in of(records, "difference"):
        first, second = scene_of[record["filepath1"]].names[0], scene_of[record["filepath2"]].names[0]
        assert first != second
        assert record["answer"] == f"the first audio has {first}, the second {second}"


def judge(statement: str, scene) -> str:
    """What the statement is worth for that scene, worked out from its words."""
    place = next((place for place in PLACES if statement.endswith(place)), "")
    words = statement.removesuffix(place).strip()
    if match := re.fullmatch(r"(.+) is heard before (.+)", words):
        is_true = scene.arrangement == SEQUENCE and scene.names == match.groups()
    elif match := re.fullmatch(r"(.+) is heard together with (.+)", words):
        is_true = scene.arrangement == TOGETHER and set(scene.names) == set(match.groups())
    else:
        is_true = re.fullmatch(r"(.+) is heard", words).group(1) in scene.names
    if not is_true:
        return "contradiction"
    return "neutral" if place else "entailment"


def test_entailment_follows_from_the_words_and_the_scene(records, scene_of):
    asked = of(records, "entailment")
    for record in asked:
        statement = re.search(r"the statement '(.+)'\? answer entailment, neutral or contradiction", record["input"])
        assert record["answer"] == judge(statement.group(1), scene_of[record["filepath1"]])
    assert Counter(record["answer"] for record in asked) == {"contradiction": 240, "entailment": 120, "neutral": 120}


def test_names_and_phrasings_do_not_give_the_answer_away(records):
    """Within each phrasing the answers stay even: chi-square with a wide bound, over what a reader could go by."""
    by_cue = defaultdict(Counter)
    for record in of(records, "event-binary"):
        by_cue["binary", record["input"]][record["answer"]] += 1
    for record in of(records, "entailment"):
        shape = re.sub("|".join(NAMES), "X", record["input"])
        by_cue["entailment", re.sub("|".join(PLACES), "P", shape)][record["answer"] == "contradiction"] += 1
    for (family, _), counts in by_cue.items():
        total = sum(counts.values())
        chi_square = sum((count - total / 2) ** 2 / (total / 2) for count in counts.values())
        chi_square += 0 if len(counts) == 2 else total / 2
        assert chi_square < (12 if family == "binary" else 1), (family, counts)


def test_being_offered_says_nothing_of_being_right(records):
    """Each name is right in a quarter of the questions that offer it."""
    offered, right = Counter(), Counter()
    for record in of(records, "event-mcq"):
        offered.update(options_of(record).values())
        right[record["answer"][3:]] += 1
    for name in NAMES:
        assert abs(right[name] / offered[name] - 0.25) < 4 * (0.1875 / offered[name]) ** 0.5


def test_chance_is_what_the_families_promise(records):
    levels = chance_levels(records)
    assert levels["event-open"] == pytest.approx(1 / 12)
    assert levels["event-mcq"] == levels["order-mcq"] == 0.25
    assert levels["event-binary"] == levels["count-open"] == levels["entailment"] == levels["same-binary"] == 0.5
    assert levels["caption"] < 0.06
    assert levels["difference"] < 0.06


def test_a_split_too_small_for_pairs_leaves_them_out():
    one = draw_scenes(0, "test", 1)
    assert {record["subtype"] for record in make_records(one, 0, "wav")}.isdisjoint({"same-binary", "difference"})
    few = draw_scenes(0, "test", 6)
    alone = {clip_path(scene, "wav"): scene for scene in few if scene.arrangement == ALONE}
    for record in make_records(few, 0, "wav"):
        if record["filepath2"]:
            assert record["filepath2"] in alone
            assert record["filepath2"] != record["filepath1"]
