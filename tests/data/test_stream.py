"""The stream is exact, the same on every world, and goes on where it stopped, tensor by tensor."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mellow_ds.config.schema import DataConfig, MixtureSet
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.batch import Batch
from mellow_ds.data.order import Order, examples_of_step, steps_per_epoch
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.stream import EvalStream, StepBatches, TrainStream
from mellow_ds.errors import ConfigError, ShardError
from mellow_ds.multiple_choice import parse_options
from mellow_ds.world import World
from tests.data.made_shards import RATE, CharTokenizer, Clip, clip_key, make_layout, simple_clips, write_shards

DATA = DataConfig(sampling_rate=RATE, segment_seconds=0.05)


def stream(folder: Path, world: World | None = None, data: dict[str, Any] | None = None, **train: Any) -> TrainStream:
    places = {name: train.pop(name) for name in ("start_step", "end_step", "state") if name in train}
    settings = TrainConfig(**{"batch_size": 3, "global_batch_size": 10, "num_workers": 0, **train})
    data_config = dataclasses.replace(DATA, **(data or {}))
    reader = ShardReader([folder], RATE)
    return TrainStream(reader, CharTokenizer(), make_layout(), data_config, settings, world or World(), **places)


def assert_same(found: list[StepBatches], expected: list[StepBatches]) -> None:
    """Equal in every tensor, id, number and state."""
    assert [(s.step, s.epoch, s.step_in_epoch, s.state) for s in found] == [
        (s.step, s.epoch, s.step_in_epoch, s.state) for s in expected
    ]
    for one, other in zip(found, expected, strict=True):
        for batch, wanted in zip(one.micro_batches, other.micro_batches, strict=True):
            for field in dataclasses.fields(Batch):
                value, reference = getattr(batch, field.name), getattr(wanted, field.name)
                same = torch.equal(value, reference) if isinstance(value, torch.Tensor) else value == reference
                assert same, f"step {one.step}: {field.name} differs"


def ids_of(steps: list[StepBatches]) -> list[str]:
    return [example for step in steps for batch in step.micro_batches for example in batch.example_ids]


def all_ids(folder: Path) -> list[str]:
    reader = ShardReader([folder], RATE)
    return [
        question.id
        for shard in range(len(reader.shards))
        for info in reader.infos(shard)
        for question in info.questions
    ]


def test_steps_hold_the_examples_of_the_order_and_run_over_epochs(shards: Path) -> None:
    with stream(shards, end_step=12) as steps:
        found = list(steps)
        order = steps.epochs
    assert [(s.step, s.epoch, s.step_in_epoch) for s in found] == [(n, n // 5, n % 5) for n in range(12)]
    reader = ShardReader([shards], RATE)
    for step in found:
        expected = []
        for shard, number, epoch in examples_of_step(order, 10, step.epoch, step.step_in_epoch).tolist():
            assert epoch == step.epoch
            row, in_sample = reader.locate(shard, number)
            expected.append(reader.sample(shard, row).info.questions[in_sample].id)
        assert ids_of([step]) == expected
        assert step.stats.num_examples == len(expected)
    assert sorted(ids_of(found[:5])) == sorted(ids_of(found[5:10])) == sorted(all_ids(shards))
    assert ids_of(found[:5]) != ids_of(found[5:10])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_world_trains_on_the_same_global_batches(shards: Path, world_size: int, batch_size: int) -> None:
    ranks = [
        list(stream(shards, World(rank, world_size), batch_size=batch_size, end_step=7)) for rank in range(world_size)
    ]
    alone = list(stream(shards, batch_size=4, end_step=7))
    for step in range(7):
        together = [example for rank in ranks for example in ids_of([rank[step]])]
        assert together == ids_of([alone[step]])
        assert len({len(rank[step].micro_batches) for rank in ranks}) == 1
        answer_tokens = [sum(b.num_answer_tokens for b in rank[step].micro_batches) for rank in ranks]
        assert sum(answer_tokens) == sum(b.num_answer_tokens for b in alone[step].micro_batches)
    most_of_a_rank = math.ceil(10 / world_size)
    counts = {len(rank[step].micro_batches) for rank in ranks for step in range(7)}
    assert counts == {math.ceil(most_of_a_rank / batch_size)}


def test_ranks_without_examples_keep_step_with_empty_batches(shards: Path) -> None:
    last = [list(stream(shards, World(rank, 5), batch_size=1, start_step=4, end_step=5)) for rank in range(5)]
    assert [sum(b.num_examples for b in rank[0].micro_batches) for rank in last] == [0, 0, 1, 0, 1]
    assert all(len(rank[0].micro_batches) == 2 for rank in last)


def test_more_ranks_than_shards_and_fewer_examples_than_a_batch(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 3)])
    ranks = [list(stream(folder, World(rank, 8), global_batch_size=64, end_step=2)) for rank in range(8)]
    for step in range(2):
        assert sorted(example for rank in ranks for example in ids_of([rank[step]])) == sorted(all_ids(folder))


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_resuming_equals_going_on(shards: Path, workers: int) -> None:
    world = World(1, 2)
    with stream(shards, world, end_step=13) as steps:
        uninterrupted = list(steps)
    first = stream(shards, world, num_workers=workers, end_step=13)
    taken = [next(first) for _ in range(6)]
    state = json.loads(json.dumps(first.state()))
    first.close()
    assert state == taken[-1].state
    with stream(shards, world, num_workers=workers, end_step=13, state=state) as steps:
        resumed = list(steps)
    assert_same(taken + resumed, uninterrupted)


def test_resuming_on_another_world_trains_on_what_was_left(shards: Path) -> None:
    state = list(stream(shards, World(0, 2), end_step=3))[-1].state
    assert len(json.dumps(state)) < 400
    left = [step for rank in range(3) for step in stream(shards, World(rank, 3), state=state, end_step=5)]
    seen = ids_of(list(stream(shards, end_step=3)))
    assert sorted(ids_of(left) + seen) == sorted(all_ids(shards))


def test_resuming_on_other_shards_is_refused_with_both_fingerprints(shards: Path, tmp_path: Path) -> None:
    state = list(stream(shards, end_step=1))[-1].state
    other = write_shards(tmp_path / "other", [simple_clips(8, 10)])
    expected = f"{ShardReader([other], RATE).fingerprint}.*{ShardReader([shards], RATE).fingerprint}"
    with pytest.raises(ShardError, match=expected):
        stream(other, state=state)


@pytest.mark.parametrize(
    ("train", "data", "named"),
    [
        ({"seed": 5}, {}, r"train\.seed is 5, but the run to go on with has 1234"),
        ({"global_batch_size": 12}, {}, r"train\.global_batch_size is 12, .* has 10"),
        ({}, {"shuffle": False}, r"data\.shuffle is False"),
        ({}, {"order_runs": 8}, r"data\.order_runs is 8"),
        ({}, {"shuffle_window": 1}, r"data\.shuffle_window is 1"),
    ],
)
def test_resuming_with_another_order_is_refused(shards: Path, train: dict, data: dict, named: str) -> None:
    state = list(stream(shards, end_step=1))[-1].state
    with pytest.raises(ConfigError, match=named):
        stream(shards, state=state, data=data, **train)


def test_a_far_step_starts_at_once(shards: Path) -> None:
    (step,) = stream(shards, start_step=1_000_003, end_step=1_000_004)
    assert (step.epoch, step.step_in_epoch) == divmod(1_000_003, 5)
    assert ids_of([step])


def damage(folder: Path, shard: int, row: int) -> str:
    """Flip a byte of a sample's audio; returns its key."""
    entry = np.load(folder / f"shard-{shard:06d}.index.npy")[row]
    path = folder / f"shard-{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    content[int(entry["audio_offset"]) + 100] ^= 1
    path.write_bytes(content)
    return entry["key"].decode()


def test_a_bad_sample_stops_the_run_by_default(shards: Path) -> None:
    key = damage(shards, 1, 3)
    with pytest.raises(ShardError, match=rf"shard-000001\.tar, sample {key} at offset \d+: its checksum"):
        list(stream(shards, end_step=5))


def test_bad_samples_are_left_out_up_to_the_fraction_and_logged(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = damage(shards, 0, 1)
    steps = list(stream(shards, data={"max_bad_fraction": 0.2}, end_step=5))
    assert len(steps) == 5
    assert len(ids_of(steps)) == 42 - 3  # its own two and the pair that names it
    assert sum(step.stats.skipped_examples for step in steps) == 3
    assert {error.place.key for step in steps for error in step.stats.bad_samples} == {key}
    assert key in caplog.text
    assert f"samples left out on this rank: 3 x checksum in {shards / 'shard-000000.tar'}" in caplog.messages
    assert [len(step.micro_batches) for step in steps] == [4] * 5


def test_past_the_fraction_the_run_stops(shards: Path) -> None:
    for row in range(6):
        damage(shards, 0, row)
    with pytest.raises(
        ShardError, match=r"more than data\.max_bad_fraction \(0\.1\) allows \(\d+ x checksum in \S+0\.tar\)"
    ):
        list(stream(shards, data={"max_bad_fraction": 0.1}, end_step=5))


def evaluated(folder: Path, world: World, batch_size: int = 4, **options: Any) -> EvalStream:
    return EvalStream(ShardReader([folder], RATE), CharTokenizer(), make_layout(), DATA, batch_size, world, **options)


@pytest.mark.parametrize("world_size", [1, 2, 5, 50])
@pytest.mark.parametrize("max_examples", [0, 11])
def test_evaluation_covers_each_example_once_over_the_world(shards: Path, world_size: int, max_examples: int) -> None:
    ranks = [list(evaluated(shards, World(rank, world_size), max_examples=max_examples)) for rank in range(world_size)]
    found = [example.id for rank in ranks for _, examples in rank for example in examples]
    assert found == all_ids(shards)[: max_examples or 42]
    assert len({len(rank) for rank in ranks}) == 1
    for batch, examples in (item for rank in ranks for item in rank):
        assert batch.example_ids == tuple(example.id for example in examples)
        assert len(examples) <= 4
        assert batch.num_answer_tokens == 0


def test_evaluation_reports_its_size_and_can_give_labels(shards: Path) -> None:
    stream_ = evaluated(shards, World(0, 2), with_answers=True)
    assert (stream_.num_examples, len(stream_)) == (42, 6)
    assert all(batch.num_answer_tokens > 0 for batch, _ in stream_)


def test_evaluation_is_the_same_each_time_and_silence_differs_in_audio_only(shards: Path) -> None:
    first, again = ([batch for batch, _ in evaluated(shards, World())] for _ in range(2))
    silent = [batch for batch, _ in evaluated(shards, World(), silence_audio=True)]
    for one, other, quiet in zip(first, again, silent, strict=True):
        assert torch.equal(one.waveforms, other.waveforms)
        assert one.waveforms.any()
        assert not quiet.waveforms.any()
        assert torch.equal(one.input_ids, quiet.input_ids)


def test_a_bad_sample_stops_an_evaluation_at_once(shards: Path) -> None:
    key = damage(shards, 0, 0)
    with pytest.raises(ShardError, match=key):
        next(iter(evaluated(shards, World())))


def test_the_order_is_built_from_the_configuration(shards: Path) -> None:
    steps = stream(shards, data={"shuffle_window": 2, "order_runs": 5}, seed=77)
    assert steps.epochs == Order((20, 14, 8), 77, True, 2, 5)
    assert steps.steps_per_epoch == steps_per_epoch(42, 10) == 5


@pytest.mark.slow
def test_evaluation_through_loader_processes_is_the_same(shards: Path) -> None:
    alone, through = (list(evaluated(shards, World(1, 2), num_workers=workers)) for workers in (0, 2))
    for (batch, examples), (other, others) in zip(alone, through, strict=True):
        assert examples == others
        assert torch.equal(batch.waveforms, other.waveforms)
        assert torch.equal(batch.input_ids, other.input_ids)


@pytest.mark.slow
def test_a_bad_sample_in_a_loader_process_is_named_as_without(shards: Path) -> None:
    key = damage(shards, 1, 3)
    with pytest.raises(ShardError, match=rf"^\S*shard-000001\.tar, sample {key} at offset \d+: its checksum"):
        list(stream(shards, end_step=5, num_workers=2))


def text_of(batch: Batch, row: int) -> str:
    """What stands in a row after its clips, up to the end."""
    attended = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
    return "".join(chr(number - 1) for number in attended if number)


def test_options_are_shuffled_by_epoch_in_training_only(tmp_path: Path) -> None:
    question = "which? a) red b) green c) blue"
    clips = [Clip(clip_key(n), questions=[((), question, "b) green")]) for n in range(6)]
    folder = write_shards(tmp_path / "options", [clips])

    def texts(epoch: int, **data: object) -> list[str]:
        with stream(folder, start_step=epoch, end_step=epoch + 1, data=data, global_batch_size=6) as steps:
            found = [text_of(b, row) for b in next(steps).micro_batches for row in range(b.num_examples)]
        return sorted(found)

    assert set(texts(0)) == {f"{question} b) green"}
    first, second = texts(0, shuffle_options=True), texts(1, shuffle_options=True)
    assert first == texts(0, shuffle_options=True)
    assert len({*first, *second}) > 3
    for row in first + second:
        asked, letter = row[: len(question)], row[len(question) + 1]
        options = parse_options(asked)
        assert sorted(options.values()) == ["blue", "green", "red"]
        assert options[letter] == "green"
        assert row.endswith(f" {letter}) green")
    assert not evaluated_texts(folder) - {question}


def evaluated_texts(folder: Path) -> set[str]:
    data = dataclasses.replace(DATA, shuffle_options=True)
    evaluation = EvalStream(ShardReader([folder], RATE), CharTokenizer(), make_layout(), data, 4, World())
    return {text_of(batch, row) for batch, examples in evaluation for row in range(len(examples))}


@pytest.mark.parametrize("k", [2, 3])
def test_questions_of_a_clip_share_its_audio_in_a_micro_batch(tmp_path: Path, k: int) -> None:
    """6 questions about each of 12 clips, one run: a micro-batch of 6 examples has at most 6 / k clips."""
    clips = [Clip(clip_key(n), questions=[((), f"question {q}", "x") for q in range(6)]) for n in range(12)]
    folder = write_shards(tmp_path / "grouped", [clips[:5], clips[5:]])
    data = {"questions_per_clip": k, "order_runs": 1, "shuffle_window": 2}
    with stream(folder, end_step=6, data=data, batch_size=6, global_batch_size=12) as steps:
        found = list(steps)
    assert sorted(ids_of(found)) == sorted(all_ids(folder))
    for step in found:
        assert all(len(batch.waveforms) <= 6 // k for batch in step.micro_batches)


def test_a_mixture_resumes_where_it_stopped_in_another_world(tmp_path: Path) -> None:
    folders = [str(write_shards(tmp_path / n, [simple_clips(ord(n), 7), simple_clips(ord(n) + 9, 4)])) for n in "ab"]
    mixture = (MixtureSet((folders[0],), weight=3), MixtureSet((folders[1],), weight=1))
    data = dataclasses.replace(DATA, mixture=mixture)
    settings = TrainConfig(batch_size=3, global_batch_size=10, num_workers=0)

    def run(world: World, **places: Any) -> list[StepBatches]:
        reader = ShardReader(data.train_shards, RATE)
        with TrainStream(reader, CharTokenizer(), make_layout(), data, settings, world, **places) as steps:
            return list(steps)

    whole = run(World(), end_step=9)
    assert_same(run(World(), end_step=9, state=whole[3].state), whole[4:])
    ranks = [run(World(rank, 3), end_step=9, state=whole[3].state) for rank in range(3)]
    for number, step in enumerate(whole[4:]):
        assert [i for rank in ranks for i in ids_of([rank[number]])] == ids_of([step])
    sets = [int(kind) // 2 for batch in whole[0].micro_batches for kind in batch.kinds.tolist()]
    assert 6 <= sets.count(0) <= 8
    changed = dataclasses.replace(data, mixture=(MixtureSet((folders[0],), weight=2), mixture[1]))
    with pytest.raises(ConfigError, match=r"data\.mixture is .* but the run to go on with has"):
        TrainStream(
            ShardReader(data.train_shards, RATE), CharTokenizer(), make_layout(), changed, settings, World(),
            state=whole[3].state,
        )  # fmt: skip


@pytest.mark.slow
def test_a_loader_holds_its_batches_and_no_window(tmp_path: Path) -> None:
    """Memory that a stream takes over three epochs of 64 MB of audio, all one window: less than a quarter of that."""
    clips = [Clip(clip_key(n), 500_000, [((), f"question {n}", "x")]) for n in range(64)]
    folder = write_shards(tmp_path / "large", [clips[first : first + 16] for first in range(0, 64, 16)])
    code = (
        "import resource, sys\n"
        "from tests.data.test_stream import *\n"
        "settings = {'segment_seconds': 1.0}\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "with stream(Path(sys.argv[1]), end_step=48, data=settings, global_batch_size=4, batch_size=4) as steps:\n"
        "    next(steps); before = peak(); seen = sum(s.stats.num_bytes for s in steps)\n"
        "print(peak() - before, seen / 2**20)"
    )
    arguments = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    grown, seen = map(float, done.stdout.split())
    assert seen > 170
    assert grown < 16


def test_remote_shards_are_asked_for_from_the_first_step_of_a_resumed_run(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[int]] = []
    monkeypatch.setattr(ShardReader, "is_remote", True)
    monkeypatch.setattr(ShardReader, "prefetch", lambda _, wanted: asked.append(set(wanted)))
    with stream(shards, start_step=13, end_step=23) as steps:
        next(steps)
        assert asked == [{0, 1, 2}]
        for _ in range(8):
            next(steps)
    assert len(asked) == 2
