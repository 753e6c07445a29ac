"""Who is behind: hand-made worlds, and an observer that is shown heartbeats as they would come."""

from pathlib import Path

import pytest

from mellow_ds.monitor.heartbeat import ENDED, Beat, write_beat
from mellow_ds.monitor.process_id import ProcessId
from mellow_ds.monitor.standstill import Observer, Seen, describe_standstill, find_behind, still_since
from tests.guide import quoted

FAR = ProcessId("gpu003", 4711)
NOW = 100.0


def seen(rank: int, step: int, phase: str, silent_seconds: float = 0.0, **fields: object) -> Seen:
    state = fields.pop("state", "runs")
    return Seen(rank, Beat(rank, FAR, 1, 1, step, phase, **fields), 40.0, NOW - silent_seconds, state)  # type: ignore[arg-type]


CASES = {
    "less far in the step": ([seen(0, 12, "forward-backward"), seen(1, 12, "fetch")], 1),
    "a step behind": ([seen(0, 12, "fetch"), seen(1, 11, "save"), seen(2, 12, "fetch")], 1),
    "rank 0 itself": ([seen(0, 12, "fetch"), seen(1, 12, "agree")], 0),
    "stopped comes before less far": ([seen(0, 11, "fetch"), seen(1, 12, "agree", state="stopped")], 1),
    "gone": ([seen(0, 12, "agree"), seen(1, 12, "agree", state="gone")], 1),
    "silent on another host": ([seen(0, 12, "agree"), seen(1, 12, "agree", 4.0, state="unknown")], 1),
    "a beat that is a little late is not silent": (
        [seen(0, 12, "fetch"), seen(1, 12, "agree", 2.0, state="unknown")], 0,
    ),
    "one that never began": ([seen(0, 0, "start"), Seen(1, None, 40.0, 40.0)], 1),
    "at one place, the one in no collective": (
        [seen(0, 12, "forward-backward", waits=True), seen(1, 12, "forward-backward")], 1,
    ),
    "all alike": ([seen(0, 12, "agree", waits=True), seen(1, 12, "agree", waits=True)], None),
    "one that has ended waits for nobody": ([seen(0, 12, "score"), seen(1, 12, ENDED, 50.0, state="gone")], 0),
    "a single rank": ([seen(0, 12, "fetch")], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_who_is_behind(name: str) -> None:
    ranks, expected = CASES[name]
    behind = find_behind(ranks, NOW)
    assert (None if behind is None else behind.rank) == expected


def line(ranks: list[Seen]) -> str:
    return describe_standstill(ranks, find_behind(ranks, NOW), NOW, 15, Path("RUN/heartbeats"))


def test_the_line_names_rank_host_phase_step_and_examples() -> None:
    assert line([seen(0, 12, "agree"), seen(1, 12, "forward-backward", examples=("a", "b"), num_examples=2)]) == (
        "no progress for 15 s (train.hang_seconds): rank 1 (host gpu003, pid 4711) is behind: it stands in "
        "forward-backward of step 12 (examples a, b); stack traces of all ranks are in RUN/heartbeats"
    )
    assert "it stands in fetch of step 12, at loader.py:3 in f;" in line(
        [seen(0, 12, "agree"), seen(1, 12, "fetch", where="loader.py:3 in f")]
    )
    assert "rank 1 (host gpu003, pid 4711) is behind: it is stopped (by a signal such as SIGSTOP), last seen in " in (
        line([seen(0, 12, "agree"), seen(1, 12, "agree", state="stopped")])
    )
    assert f"is behind: it {quoted('gives no sign of life')}, last seen in agree of step 12;" in (
        line([seen(0, 12, "agree"), seen(1, 12, "agree", 9.0, state="unknown")])
    )
    assert "rank 1 is behind: it has left no heartbeat;" in line([seen(0, 12, "agree"), Seen(1, None, 0.0, 0.0)])
    assert f"all 2 ranks are in agree of step 12, {quoted('none behind the others')};" in (
        line([seen(0, 12, "agree", waits=True), seen(1, 12, "agree", waits=True)])
    )
    assert ": rank 0 (host gpu003, pid 4711) stands in fetch of step 12;" in line([seen(0, 12, "fetch")])


def test_an_observer_sees_who_gets_further_and_who_only_beats(tmp_path: Path) -> None:
    def beats(rank: int, beats: int, progress: int, grace: float = 0.0) -> None:
        write_beat(tmp_path, Beat(rank, FAR, beats, progress, 12, "save", grace_seconds=grace))

    beats(0, 1, 1)
    beats(1, 1, 1)
    observer = Observer(tmp_path, range(3), since=10.0, began=20.0)
    assert still_since(observer.look(20.0), 20.0) == 10.0  # what was before the first look is not known
    beats(0, 2, 2)
    beats(1, 2, 1)
    first, second, third = observer.look(21.0)
    assert (first.progress_at, first.beat_at) == (21.0, 21.0)
    assert (second.progress_at, second.beat_at) == (10.0, 21.0)
    assert third.beat is None
    assert still_since([first, second], 21.0) == 21.0
    (tmp_path / "rank-00000.json").write_bytes(b"{torn")
    assert observer.look(22.0)[0].beat == first.beat


def test_a_phase_that_may_take_long_is_waited_for_unless_a_process_is_stopped() -> None:
    saving = [seen(0, 12, "save", grace_seconds=1000.0), seen(1, 12, "agree")]
    assert still_since(saving, NOW) == 1040.0
    assert still_since([*saving, seen(2, 12, "agree", state="stopped")], NOW) == 40.0
