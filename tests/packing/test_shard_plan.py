"""Plans of shards: questions stand with their first clip, copies have none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mellow_ds.packing.catalogue import Catalogue
from mellow_ds.packing.question_file import read_questions
from mellow_ds.packing.question_set import gather_questions
from mellow_ds.packing.records import Record
from mellow_ds.packing.settings import BuildSettings
from mellow_ds.packing.shard_plan import ShardPlan, plan_shards
from mellow_ds.packing.survey import Survey

LETTERS = "abcdef"
PCM_BYTES = 64_000
Plans = Callable[..., tuple[list[ShardPlan], list[str], dict[str, list[str]]]]


def key(letter: str) -> str:
    return letter * 32


def question(name: str, *clips: str) -> Record:
    """A question whose answer is its name."""
    return Record("r.json", int(name), clips, (), "tone?", name, "binary", "")


@pytest.fixture
def plans_of(tmp_path: Path) -> Plans:
    def plan(
        records: list[Record], settings: BuildSettings, versions: str = "1.0"
    ) -> tuple[list[ShardPlan], list[str], dict[str, list[str]]]:
        """(plans, their fingerprints, answers by the letter of the clip that the question stands with)."""
        with Catalogue(None) as catalogue:
            for letter in LETTERS:
                catalogue.number_of(letter)
            clips = np.arange(len(LETTERS), dtype=np.int32)
            keys = np.array([bytes.fromhex(key(letter)) for letter in LETTERS], "S16")
            second = np.full(len(LETTERS), 32_000)
            survey = Survey(clips, keys, clips, clips, second, second, "")
            found = gather_questions(records, ["r.json"], catalogue, survey, tmp_path)
            file = plan_shards(found, survey, catalogue, settings, tmp_path / "plans")
        plans = [file.read(number) for number in range(len(file))]
        standing: dict[str, list[str]] = {}
        with found.file.path.open("rb", buffering=0) as questions:
            marks = [plan.fingerprint(versions, questions) for plan in plans]
            for clip in (clip for plan in plans for clip in plan.clips):
                answers = [own.answer for own in read_questions(questions, clip.questions)]
                if answers:
                    standing.setdefault(clip.key[0], []).extend(answers)
                assert clip.source == clip.key[0]
        return plans, marks, standing

    return plan


def test_every_question_stands_once_with_its_first_clip_and_its_others_beside_it(plans_of: Plans) -> None:
    records = [
        question("1", "a"),
        question("2", "a", "f"),
        question("3", "f", "c"),
        question("4", "b"),
        question("5", "f"),
    ]
    settings = BuildSettings(codec="pcm", shard_megabytes=2.5 * PCM_BYTES / 1e6)
    plans, _, standing = plans_of(records, settings)
    assert [plan.name for plan in plans] == [f"shard-{number:06d}.tar" for number in range(len(plans))]
    assert len(plans) > 1
    assert standing == {"a": ["1", "2"], "f": ["3", "5"], "b": ["4"]}
    homes = {clip.key[0]: plan for plan in plans for clip in plan.clips if clip.questions[1]}
    for record in records:
        assert {key(path) for path in record.paths} <= {clip.key for clip in homes[record.paths[0]].clips}
    stored = {clip.key[0] for plan in plans for clip in plan.clips}
    assert stored == set("abcf"), "a clip without a question is not stored"


def test_the_size_of_a_shard_is_estimated_from_the_header_and_the_codec(plans_of: Plans) -> None:
    records = [question(str(number), letter) for number, letter in enumerate(LETTERS)]

    def sizes(**settings: object) -> list[int]:
        asked = BuildSettings(shard_megabytes=3 * PCM_BYTES * 1.05 / 1e6, **settings)  # type: ignore[arg-type]
        return [len(plan.clips) for plan in plans_of(records, asked)[0]]

    assert sizes(codec="pcm") == [3, 3]
    assert sizes(codec="flac") == [4, 2]
    assert sizes(codec="pcm", sample_rate=16_000) == [5, 1]


def test_the_fingerprint_follows_all_that_goes_in(plans_of: Plans) -> None:
    records = [question("1", "a"), question("2", "a", "b")]
    (base,) = plans_of(records, BuildSettings())[1]
    captioned = Record("r.json", 2, ("a", "b"), ("x", "y"), "tone?", "2", "binary", "")
    others = [
        plans_of(records, BuildSettings(), versions="1.1")[1],
        plans_of(records, BuildSettings(codec="pcm"))[1],
        plans_of(records, BuildSettings(sample_rate=16_000))[1],
        plans_of(records[:1], BuildSettings())[1],
        plans_of([records[0], captioned], BuildSettings())[1],
    ]
    assert len({base, *(mark for (mark,) in others)}) == 6
    moved = [
        Record("r.json", record.number + 7, *[getattr(record, name) for name in record.__struct_fields__[2:]])
        for record in records
    ]
    assert plans_of(moved, BuildSettings(workers=3))[1] == [base], "where a record stood in its file does not matter"
