"""Plans of shards: questions stand with their first clip, copies have none."""

from mellow_ds.packing.decode import Header
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.shard_plan import plan_shards
from mellow_ds.packing.survey import SourceClip
from mellow_ds.shard_format import Question

CLIPS = {key: SourceClip(key, f"{key}.wav", Header(32_000, 1, 32_000)) for key in "abcdef"}
PCM_BYTES = 64_000


def question(name: str, *clips: str) -> Question:
    return Question(name, clips, "tone?", "yes", "binary")


def test_every_question_stands_once_with_its_first_clip_and_its_others_beside_it() -> None:
    questions = [
        question("1", "a"),
        question("2", "a", "f"),
        question("3", "f", "c"),
        question("4", "b"),
        question("5", "f"),
    ]
    plans = plan_shards(questions, CLIPS, BuildSettings(codec="pcm", shard_megabytes=2.5 * PCM_BYTES / 1e6))
    assert [plan.name for plan in plans] == [f"shard-{number:06d}.tar" for number in range(len(plans))]
    assert len(plans) > 1
    standing = [(q.id, clip.key) for plan in plans for clip in plan.clips for q in clip.questions]
    assert sorted(standing) == [("1", "a"), ("2", "a"), ("3", "f"), ("4", "b"), ("5", "f")]
    for plan in plans:
        keys = {clip.key for clip in plan.clips}
        assert all(set(q.clips) <= keys for clip in plan.clips for q in clip.questions)
    assert {clip.key for plan in plans for clip in plan.clips} == set("abcf"), "a clip without a question is not stored"


def test_the_size_of_a_shard_is_estimated_from_the_header_and_the_codec() -> None:
    questions = [question(key, key) for key in "abcdef"]
    settings = {"shard_megabytes": 3 * PCM_BYTES * 1.05 / 1e6}
    assert [len(plan.clips) for plan in plan_shards(questions, CLIPS, BuildSettings(codec="pcm", **settings))] == [3, 3]
    assert [len(plan.clips) for plan in plan_shards(questions, CLIPS, BuildSettings(codec="flac", **settings))] == [
        4,
        2,
    ]
    halved = BuildSettings(codec="pcm", sample_rate=16_000, **settings)
    assert [len(plan.clips) for plan in plan_shards(questions, CLIPS, halved)] == [5, 1]


def test_the_fingerprint_follows_all_that_goes_in() -> None:
    questions = [question("1", "a"), question("2", "a", "b")]
    base = plan_shards(questions, CLIPS, BuildSettings())[0].fingerprint("1.0")
    other_text = [questions[0], Question("2", ("a", "b"), "tone?", "yes", "binary", captions=("x", "y"))]
    others = [
        plan_shards(questions, CLIPS, BuildSettings())[0].fingerprint("1.1"),
        plan_shards(questions, CLIPS, BuildSettings(codec="pcm"))[0].fingerprint("1.0"),
        plan_shards(questions, CLIPS, BuildSettings(sample_rate=16_000))[0].fingerprint("1.0"),
        plan_shards(questions[:1], CLIPS, BuildSettings())[0].fingerprint("1.0"),
        plan_shards(other_text, CLIPS, BuildSettings())[0].fingerprint("1.0"),
    ]
    assert len({base, *others}) == 6
    assert plan_shards(questions, CLIPS, BuildSettings(workers=3))[0].fingerprint("1.0") == base
