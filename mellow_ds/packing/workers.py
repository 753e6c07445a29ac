"""Run shard plans in processes: a shard at a time each, progress by clip, no process left when the build dies."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_handle
from pathlib import Path
from typing import Any

from mellow_ds.errors import FaultError
from mellow_ds.packing.shard_plan import ShardPlan
from mellow_ds.packing.write import ShardNote, write_shard

_POLL_SECONDS = 0.2


class _Stopped(Exception):
    """The build has failed elsewhere."""


_on_clip: Callable[[], None]  # of this worker process; set by _start_worker


def write_shards(
    plans: list[tuple[ShardPlan, str]], audio_root: Path, folder: Path, workers: int, bar: Any
) -> list[ShardNote]:
    """Write all plans (with their fingerprints) into `folder`; notes in the order of `plans`, `bar.update` each clip.

    One worker, or one shard, needs no process of its own. Raises `OSError` where writing fails, `FaultError` where a
    worker was killed.
    """
    if not plans:
        return []
    workers = min(workers, len(plans))
    if workers <= 1:
        with _one_torch_thread():
            return [write_shard(plan, mark, audio_root, folder, bar.update) for plan, mark in plans]
    return _write_in_processes(plans, audio_root, folder, workers, bar)


def _write_in_processes(
    plans: list[tuple[ShardPlan, str]], audio_root: Path, folder: Path, workers: int, bar: Any
) -> list[ShardNote]:
    # forkserver: the seconds that importing torch takes are spent once, and no thread or GPU handle of ours is forked
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchaudio", "webdataset", "mellow_ds.packing.write"])
    num_done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (num_done, stop)) as pool:
        futures = [pool.submit(_write_in_worker, plan, mark, audio_root, folder) for plan, mark in plans]
        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                bar.update(num_done.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise FaultError(
                "a worker process was killed, perhaps for want of memory: start the build again with fewer --workers; "
                "finished shards are kept"
            ) from None
        except BaseException:
            stop.set()  # heard after the clip that is being packed
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _write_in_worker(plan: ShardPlan, mark: str, audio_root: Path, folder: Path) -> ShardNote:
    return write_shard(plan, mark, audio_root, folder, _on_clip)


def _start_worker(num_done: Any, stop: Any) -> None:
    """Set up this worker process: Ctrl-C is the parent's to handle, and a parent that is gone ends it."""
    global _on_clip
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)  # the processes share the cores

    def count() -> None:
        with num_done.get_lock():
            num_done.value += 1
        if stop.is_set():
            raise _Stopped

    _on_clip = count


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_handle([parent.sentinel])
    os._exit(1)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The bytes of a resampled clip may depend on the number of threads; the caller's setting is put back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
