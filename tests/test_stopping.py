"""Signals become exit codes; a budget of wall clock leaves room for a step and a save."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from mellow_ds import stopping
from mellow_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from mellow_ds.stopping import StopRequest, TimeBudget


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Signals are as they were afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR1, EXIT_STOPPED), (signal.SIGTERM, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)],
)
def test_signals_become_exit_codes(number: signal.Signals, code: int) -> None:
    stop = StopRequest()
    stop.listen()
    signal.raise_signal(number)
    assert stop.exit_code == code


@pytest.mark.parametrize(
    ("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGTERM", "SIGUSR1")]
)
def test_a_second_signal_ends_the_process_at_once(first: str, second: str) -> None:
    code = f"""
import signal
from mellow_ds.stopping import StopRequest
stop = StopRequest()
stop.listen()
signal.raise_signal(signal.{first})
print("goes on", stop.exit_code, flush=True)
signal.raise_signal(signal.{second})
print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"goes on {EXIT_INTERRUPTED if first == 'SIGINT' else EXIT_STOPPED}\n"
    assert done.returncode == -signal.Signals[second]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_ends_a_process_that_is_not_in_python(second: signal.Signals) -> None:
    """Such as a rank that waits for another in a collective; two that come together are one."""
    code = """
import ctypes
from mellow_ds.stopping import StopRequest
StopRequest().listen()
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
library.pthread_mutex_lock(mutex)
print("waits", flush=True)
library.pthread_mutex_lock(mutex)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"waits\n"
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            time.sleep(1.2)
            assert process.poll() is None
            process.send_signal(second)
            assert process.wait(60) == -second
        finally:
            process.kill()


def test_signals_of_a_child_that_was_forked_are_its_own() -> None:
    code = """
import os, signal, time
from mellow_ds.stopping import StopRequest
StopRequest().listen()
for _ in range(2):
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    os.waitpid(pid, 0)
    time.sleep(1.2)
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("goes on\n", 0)


def test_ctrl_c_ends_the_start_at_once() -> None:
    stop = StopRequest()
    stop.listen(interrupt=False)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == EXIT_STOPPED


def test_where_all_is_saved_a_signal_ends_the_process_with_its_code() -> None:
    stop = StopRequest()
    stop.listen()
    with pytest.raises(SystemExit) as caught, stop.at_once():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == EXIT_STOPPED
    with pytest.raises(SystemExit) as caught, stop.at_once():  # and so does one from before
        pytest.fail("not reached")
    assert caught.value.code == EXIT_STOPPED


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at its only item."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


def test_a_budget_leaves_room_for_the_longest_step_and_save(clock: list[float]) -> None:
    budget = TimeBudget(1.0, started=40.0)  # ends at 3640
    budget.note_step()
    for seconds in (30, 80, 20):
        clock[0] += seconds
        budget.note_step()
    budget.note_save(40)
    budget.note_save(30)
    clock[0] = 3640 - 1.25 * (80 + 40) - 1
    assert not budget.is_spent
    clock[0] += 2
    assert budget.is_spent


def test_before_a_save_is_measured_a_tenth_of_the_budget_is_kept_at_most_a_minute(clock: list[float]) -> None:
    for hours, kept in ((0.1, 36), (10, 60)):
        clock[0] = 0.0
        budget = TimeBudget(hours, started=0.0)
        clock[0] = 3600 * hours
        assert not budget.is_spent  # a run makes one step at least
        clock[0] = 0.0
        budget.note_step()
        clock[0] = 1.0
        budget.note_step()
        clock[0] = 3600 * hours - 1.25 * (1 + kept) - 1
        assert not budget.is_spent
        clock[0] += 2
        assert budget.is_spent


def test_what_is_built_between_two_phases_is_no_step(clock: list[float]) -> None:
    budget = TimeBudget(1.0, started=0.0)
    for begins in (0.0, 1000.0):  # 990 s of building
        clock[0] = begins
        budget.begin_steps()
        budget.note_step()
        clock[0] = begins + 10
        budget.note_step()
    clock[0] = 3600 - 1.25 * (10 + 60) - 1
    assert not budget.is_spent
    clock[0] += 2
    assert budget.is_spent


def test_no_budget_is_never_spent(clock: list[float]) -> None:
    budget = TimeBudget(0.0, started=0.0)
    budget.note_step()
    clock[0] = 1e9
    budget.note_step()
    assert not budget.is_spent


def test_a_signal_in_the_last_moment_does_not_make_a_finished_run_look_failed() -> None:
    """When Python has taken its handlers back already, as it has where objects of the main module go."""
    code = (
        "import os, signal, sys\n"
        "from mellow_ds.stopping import StopRequest\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1): kill(pid, number)\n"
        "last = Last()\n"
        "StopRequest().listen()\n"
        f"sys.exit({EXIT_STOPPED})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == EXIT_STOPPED
