"""The same work on every shard, in processes: a shard at a time each, progress by clip, no process left behind."""

import multiprocessing
import multiprocessing.resource_tracker as resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_handle
from typing import Any, TypeVar

from mellow_ds.errors import FaultError

_POLL_SECONDS = 0.2

Task = TypeVar("Task")
Result = TypeVar("Result")


class _Stopped(Exception):
    """The work has failed elsewhere."""


_count: Callable[[], None]  # of this worker process; set by _start_worker


def each_shard(
    work: Callable[[Task, Callable[[], None]], Result],
    tasks: Sequence[Task],
    workers: int,
    bar: Any,
    preload: Sequence[str] = (),
) -> list[Result]:
    """`work(task, count)` of all tasks, in their order; `bar` moves on for each `count()`.

    `work` is a function of a module. One worker, or one task, needs no process of its own. What `work` raises comes
    out; raises `FaultError` where a worker was killed. `preload`: modules that are imported once for all processes.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        return [work(task, bar.update) for task in tasks]
    return list(_in_processes(work, tasks, workers, bar, preload))


def _in_processes(
    work: Callable[[Task, Callable[[], None]], Result],
    tasks: Sequence[Task],
    workers: int,
    bar: Any,
    preload: Sequence[str],
) -> Iterator[Result]:
    # forkserver: what is imported is imported once, and no thread of ours is forked
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, work.__module__])
    num_done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (num_done, stop)) as pool:
        futures = []
        try:
            with _interrupt_later():
                futures += [pool.submit(_work_in_worker, work, task) for task in tasks]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                bar.update(num_done.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise FaultError(
                "a worker process was killed, perhaps for want of memory: start again with fewer --workers; "
                "finished shards are kept"
            ) from None
        except BaseException:
            stop.set()  # heard after the clip that is being looked at
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        yield from (future.result() for future in futures)


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Hold Ctrl-C back, and from what is started meanwhile for good: hit while the fork server imports, or a worker is
    half made, it would print their tracebacks beside our one line."""
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts, and the fork server would start it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work_in_worker(work: Callable[[Any, Callable[[], None]], Any], task: Any) -> Any:
    return work(task, _count)


def _start_worker(num_done: Any, stop: Any) -> None:
    """Set up this worker process: Ctrl-C is the parent's to handle, and a parent that is gone ends it."""
    global _count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count() -> None:
        with num_done.get_lock():
            num_done.value += 1
        if stop.is_set():
            raise _Stopped

    _count = count


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_handle([parent.sentinel])
    os._exit(1)
