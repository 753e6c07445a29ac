"""Heartbeat files: what they hold, when they are written, and what a rank that fails leaves in them."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mellow_ds.errors import ConfigError, FaultError
from mellow_ds.monitor import heartbeat as heartbeat_module
from mellow_ds.monitor.endings import ENDINGS_NAME, Ending, add_ending, first_ending, make_endings, tell_torchrun
from mellow_ds.monitor.heartbeat import (
    ENDED,
    PHASES,
    Beat,
    Heartbeat,
    RankHeartbeat,
    beat_path,
    describe_work,
    interval_seconds,
    make_heartbeats,
    read_beat,
    write_beat,
)
from mellow_ds.monitor.process_id import ProcessId
from mellow_ds.monitor.watchdog import open_heartbeat
from mellow_ds.world import World

TWO = World(0, 2, 0, "a test", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_heartbeats(tmp_path / "heartbeats")
    return tmp_path / "heartbeats"


def waits_for(found: object, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    assert callable(found)
    while not found() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found())


def ended_process() -> ProcessId:
    """One that was there and is gone."""
    code = "import dataclasses, json; from mellow_ds.monitor.process_id import ProcessId; "
    code += "print(json.dumps(dataclasses.asdict(ProcessId.own())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ProcessId(**json.loads(done.stdout))


def test_what_is_written_is_read_back(folder: Path) -> None:
    beat = Beat(
        rank=3, process=ProcessId.own(), beats=7, progress=41, step=12, phase="forward-backward",
        examples=("a", "b"), num_examples=2, where="file.py:3 in f", waits=True,
    )  # fmt: skip
    write_beat(folder, beat)
    assert read_beat(folder, 3) == beat
    plain = json.loads((folder / "rank-00003.json").read_text())
    assert (plain["step"], plain["phase"], plain["process"]["pid"]) == (12, "forward-backward", os.getpid())
    assert plain["time"].startswith("20")


def test_a_shorter_record_leaves_nothing_of_a_longer_one(folder: Path) -> None:
    heartbeat = RankHeartbeat(folder, World())
    heartbeat.at("forward-backward", 1, [[f"{number:032x}" for number in range(1000)]])
    write_beat(folder, heartbeat.now())
    long = read_beat(folder, 0)
    assert long is not None
    assert long.num_examples == 1000
    assert 20 < len(long.examples) < 100
    assert long.examples[1] == f"{1:032x}"
    heartbeat.at("fetch", 2)
    write_beat(folder, heartbeat.now())
    assert beat_path(folder, 0).stat().st_size == 4096
    short = read_beat(folder, 0)
    assert short is not None
    assert (short.phase, short.step, short.examples, short.num_examples) == ("fetch", 2, (), 0)


def test_a_record_too_long_for_its_block_loses_its_examples(folder: Path) -> None:
    heartbeat = RankHeartbeat(folder, World())
    heartbeat.at("forward-backward", 1, [["\N{SNOWMAN}" * 300]])
    heartbeat.stands_at = ("\N{SNOWMAN}" * 3000, False)
    write_beat(folder, heartbeat.now())
    beat = read_beat(folder, 0)
    assert beat is not None
    assert beat.examples == ()
    assert beat.num_examples == 1


@pytest.mark.parametrize("content", [b"", b'{"rank": 3, "beats"', b"[]", b'{"rank": 3}', b"\xff\xfe"])
def test_a_file_that_is_no_record_is_none(folder: Path, content: bytes) -> None:
    assert read_beat(folder, 3) is None
    beat_path(folder, 3).write_bytes(content)
    assert read_beat(folder, 3) is None


def test_a_step_writes_nothing_and_a_thread_writes_each_second(folder: Path) -> None:
    heartbeat = open_heartbeat(folder, World(), 600)
    assert waits_for(lambda: read_beat(folder, 0) is not None)
    for step in range(20_000):
        heartbeat.at("fetch", step)
    assert waits_for(lambda: (beat := read_beat(folder, 0)) is not None and beat.progress == 20_000)
    beat = read_beat(folder, 0)
    assert beat is not None
    assert beat.step == 19_999
    assert beat.beats < 10
    heartbeat.close()
    heartbeat.close()
    ended = read_beat(folder, 0)
    assert ended is not None
    assert ended.phase == ENDED
    assert ended.step == 19_999


def test_a_rank_that_does_not_get_further_goes_on_beating(folder: Path) -> None:
    with open_heartbeat(folder, World(), 600):
        assert waits_for(lambda: (beat := read_beat(folder, 0)) is not None and beat.beats >= 3)
        beat = read_beat(folder, 0)
        assert beat is not None
        assert beat.progress == 0


def test_a_beat_within_a_phase_is_progress_and_keeps_the_rest(folder: Path) -> None:
    heartbeat = RankHeartbeat(folder, World())
    heartbeat.at("save", 4, grace_seconds=9.0)
    before = heartbeat.now()
    heartbeat.beat()
    assert heartbeat.now() == before._replace(progress=before.progress + 1)


def test_a_folder_that_goes_away_stops_no_training(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    heartbeat = RankHeartbeat(folder, World())
    heartbeat.start()
    with caplog.at_level("WARNING", "mellow_ds"):
        assert heartbeat.failed(FaultError("it broke")) is None
        heartbeat.close()
    assert any("the other ranks are not told" in record.message for record in caplog.records)


def test_a_new_run_starts_without_what_the_old_one_left(folder: Path) -> None:
    write_beat(folder, RankHeartbeat(folder, World(3, 4)).now())
    (folder / "rank-00003.stacks.txt").write_text("old")
    add_ending(folder, Ending(3, "old"))
    make_heartbeats(folder)
    assert [path.name for path in folder.iterdir()] == [ENDINGS_NAME]
    assert first_ending(folder) is None


def test_phases_are_in_the_order_of_a_step() -> None:
    places = [Beat(0, ProcessId.own(), 0, 0, 3, phase).place for phase in PHASES]
    assert places == sorted(places)
    assert places[-1] < Beat(0, ProcessId.own(), 0, 0, 4, "fetch").place


def test_thousands_of_ranks_beat_more_slowly() -> None:
    assert interval_seconds(1) == interval_seconds(64) == 1.0
    assert interval_seconds(512) == pytest.approx(5.12)
    assert interval_seconds(10_000) == 10.0


def test_work_in_words() -> None:
    beat = Beat(0, ProcessId.own(), 0, 0, 12, "forward-backward", ("a", "b", "c", "d", "e"), 9)
    assert describe_work(beat) == "forward-backward of step 12 (examples a, b, c, d and 5 more)"
    assert describe_work(beat._replace(step=0, num_examples=0)) == "forward-backward"


def test_the_first_whole_line_of_the_endings_counts(tmp_path: Path) -> None:
    assert first_ending(tmp_path) is None
    make_endings(tmp_path)
    assert first_ending(tmp_path) is None
    with (tmp_path / ENDINGS_NAME).open("a") as file:
        file.write("{torn\n")
    add_ending(tmp_path, Ending(1, "one", 2))
    add_ending(tmp_path, Ending(0, "two"))
    assert first_ending(tmp_path) == Ending(1, "one", 2)


def test_many_ranks_that_fail_at_once_write_whole_lines(tmp_path: Path) -> None:
    make_endings(tmp_path)
    threads = [threading.Thread(target=add_ending, args=(tmp_path, Ending(n, "x" * 1500))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [json.loads(line) for line in (tmp_path / ENDINGS_NAME).read_text().splitlines()]
    assert sorted(record["rank"] for record in records) == list(range(20))
    assert first_ending(tmp_path) == Ending(records[0]["rank"], "x" * 1500)


def test_a_failure_is_told_and_one_after_it_is_put_in_its_words(folder: Path) -> None:
    first, second = RankHeartbeat(folder, World(1, 2, 1, "a test", 2)), RankHeartbeat(folder, TWO)
    assert first.failed(ConfigError("the first\nmessage")) is None
    assert first_ending(folder) == Ending(1, "the first message", 2)
    said = second.failed(RuntimeError("[..gloo/transport/tcp/pair.cc] Connection closed by peer"))
    assert str(said) == "ended because rank 1 failed first: the first message"
    assert said is not None
    assert said.exit_code == 2
    # what a rank says for itself stays its own
    assert second.failed(FaultError("a reason of its own")) is None


def test_an_error_without_another_failure_stays_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_module, "_FIRST_FAILURE_SECONDS", 60.0)
    heartbeat = RankHeartbeat(folder, TWO)
    started = time.monotonic()
    assert heartbeat.failed(ZeroDivisionError("division by zero")) is None
    assert time.monotonic() - started < 30
    assert first_ending(folder) == Ending(0, "ZeroDivisionError: division by zero", 1)


def test_a_broken_connection_waits_for_the_message_of_who_broke_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_module, "_FIRST_FAILURE_SECONDS", 60.0)
    late = threading.Timer(0.5, add_ending, (folder, Ending(1, "late")))
    late.start()
    said = RankHeartbeat(folder, TWO).failed(RuntimeError("Connection reset by peer"))
    assert str(said) == "ended because rank 1 failed first: late"


def test_a_rank_that_was_killed_is_named(folder: Path) -> None:
    gone = RankHeartbeat(folder, World(1, 2, 1, "a test", 2), ended_process())
    gone.at("forward-backward", 12, [["a", "b"]])
    write_beat(folder, gone.now())
    said = RankHeartbeat(folder, TWO).failed(RuntimeError("Connection closed by peer"))
    assert str(said).startswith(f"ended because rank 1 failed first: the process ({gone.process}) was killed")
    assert "forward-backward of step 12 (examples a, b)" in str(said)
    # one that ended in order was not
    gone.at(ENDED)
    write_beat(folder, gone.now())
    assert RankHeartbeat(folder, TWO).gone_neighbour() is None


def test_torchrun_is_told_in_the_form_that_it_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by torch's own code."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = folder / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    RankHeartbeat(folder, TWO).failed(FaultError("it broke"))
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message["message"] == "rank 0: it broke"
    assert abs(failure.timestamp - time.time()) < 60


def test_a_rank_that_a_signal_stops_alone_takes_the_others_with_it(folder: Path) -> None:
    stopped = RankHeartbeat(folder, World(1, 2, 1, "a test", 2))
    with pytest.raises(SystemExit), stopped.hearing_failures():
        raise SystemExit(85)
    said = RankHeartbeat(folder, TWO).failed(RuntimeError("Connection closed by peer"))
    assert said is not None
    assert (str(said), said.exit_code) == ("ended because rank 1 was stopped", 85)


def test_an_exception_passes_through_or_in_the_words_of_the_first(folder: Path) -> None:
    with pytest.raises(KeyError), Heartbeat().hearing_failures():
        raise KeyError
    add_ending(folder, Ending(1, "the first"))
    heartbeat = RankHeartbeat(folder, TWO)
    with pytest.raises(FaultError, match="rank 1 failed first: the first"), heartbeat.hearing_failures():
        raise RuntimeError("anything")


def test_torchrun_takes_the_rank_that_spoke_for_the_first(tmp_path: Path) -> None:
    """Though rank 0, which ends of it in the same second, says nothing and has the lower number."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    tell_torchrun("rank 1: no good", str(tmp_path / "error.json"))
    failures = {
        rank: ProcessFailure(local_rank=rank, pid=rank, exitcode=1, error_file=file)
        for rank, file in enumerate(["<N/A>", str(tmp_path / "error.json")])
    }
    rank, failure = ChildFailedError("train.py", failures).get_first_failure()
    assert (rank, failure.message["message"]) == (1, "rank 1: no good")
