"""Loader processes: order, errors, and their end, with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mellow_ds.data.loader import OrderedLoader
from mellow_ds.errors import FaultError, ShardError

pytestmark = pytest.mark.slow
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def number_and_process(number: int) -> tuple[int, int]:
    """Later items of a round of two come first."""
    time.sleep(0.05 * (number % 2 == 0))
    return number, os.getpid()


def threads_of_torch(_: int) -> int:
    return torch.get_num_threads()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ShardError("shard-000007.tar, sample abc at offset 512: it is broken")
    if number == 5:
        raise ZeroDivisionError("not foreseen")
    return number


def load(make: object, count: int, num_workers: int = 2, items_ahead: int = 4) -> OrderedLoader:
    return OrderedLoader(make, range(count), num_workers, items_ahead)


def alive(process: int) -> bool:
    """True where a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(processes: set[int], seconds: float) -> set[int]:
    """Those that are still there in the end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(alive, processes)):
        time.sleep(0.05)
    return {process for process in processes if alive(process)}


@pytest.fixture
def loader() -> Iterator[OrderedLoader]:
    made = load(number_and_process, 1000)
    yield made
    made.close()


def test_items_come_in_order_from_two_processes(loader: OrderedLoader) -> None:
    found = [next(loader) for _ in range(20)]
    assert [number for number, _ in found] == list(range(20))
    assert len({process for _, process in found}) == 2
    assert os.getpid() not in {process for _, process in found}


def test_without_workers_items_are_made_here_when_asked_for() -> None:
    loader = load(number_and_process, 3, num_workers=0)
    assert list(loader) == [(number, os.getpid()) for number in range(3)]
    loader.close()


def test_a_loader_process_uses_one_thread_and_leaves_our_random_numbers_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert list(load(threads_of_torch, 4)) == [1] * 4
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_come_out_as_they_were_raised() -> None:
    loader = load(fail_at_three, 9)
    assert [next(loader) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ShardError, match=r"^shard-000007\.tar, sample abc at offset 512: it is broken$") as caught:
        next(loader)
    assert "fail_at_three" in str(caught.value.__cause__)
    assert next(loader) == 4
    with pytest.raises(ZeroDivisionError, match="not foreseen"):
        next(loader)
    loader.close()


def reset_at_three(number: int) -> int:
    if number == 3:
        raise ConnectionResetError(104, "Connection reset by peer")
    return number


def test_a_connection_that_a_killed_process_resets_is_that_error_too() -> None:
    """Tensors are handed over by their file descriptors, which the process is asked for when it may be gone."""
    loader = OrderedLoader(reset_at_three, range(9), num_workers=0, items_ahead=1)
    assert [next(loader) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FaultError, match=r"a loader process died .*Connection reset by peer.*lower train\.num_workers"):
        next(loader)


@on_linux
def test_a_killed_loader_process_is_an_error_not_a_hang(loader: OrderedLoader) -> None:
    _, victim = next(loader)
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(FaultError, match=r"a loader process died .*lower train\.num_workers"):
        list(loader)
    assert time.monotonic() - started < 30


@on_linux
def test_signals_for_the_trainer_leave_loader_processes_working(loader: OrderedLoader) -> None:
    processes = {process for _, process in (next(loader) for _ in range(2))}
    for process in processes:
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process, sent)
    assert [number for number, _ in (next(loader) for _ in range(10))] == list(range(2, 12))


@on_linux
def test_closing_ends_the_processes(loader: OrderedLoader) -> None:
    processes = {process for _, process in (next(loader) for _ in range(4))}
    loader.close()
    assert not wait_until_gone(processes, 10)


TRAINER = """
import sys, time
sys.path.insert(0, {folder!r})
from tests.data.test_loader import load, number_and_process

if __name__ == "__main__":
    loader = load(number_and_process, 1000)
    print(*{{process for _, process in (next(loader) for _ in range(4))}}, flush=True)
    {ending}
"""


def run_trainer(tmp_path: Path, ending: str) -> tuple[subprocess.Popen, set[int]]:
    """A process that holds a loader, and the ids of its loader processes."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.format(folder=str(Path(__file__).parents[2]), ending=ending))
    trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    return trainer, set(map(int, trainer.stdout.readline().split()))


@on_linux
def test_loader_processes_die_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    trainer, processes = run_trainer(tmp_path, "time.sleep(100)")
    assert len(processes) == 2
    trainer.kill()
    trainer.wait()
    assert not wait_until_gone(processes, 10)


@on_linux
def test_a_trainer_that_forgets_to_close_still_ends(tmp_path: Path) -> None:
    trainer, processes = run_trainer(tmp_path, "sys.exit(7)")
    assert trainer.wait(timeout=30) == 7
    assert not wait_until_gone(processes, 10)
