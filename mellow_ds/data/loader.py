"""Loader processes: items of a builder, in order, prepared ahead by processes that die with the trainer.

Processes start by `forkserver`: forking a process that holds CUDA or running threads is not safe. torch is imported
once, in the fork server. An error in a loader process comes out of the iterator as the exception that it was.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mellow_ds.data.shared_slots import SharedSlots
from mellow_ds.errors import FaultError, MellowError

Item = TypeVar("Item")

_SECONDS_AFTER_SIGTERM = 60  # a preempted job's trainer still finishes its step and saves


class _Failure:
    """An exception on its way out of a loader process; its traceback travels as text."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.trace = "".join(traceback.format_exception(error))

    def pin_memory(self) -> "_Failure":
        return self


class _Items(Dataset[Any]):
    """`make` as a dataset, which hands back what it raises instead of a page of traceback."""

    def __init__(self, make: Callable[[int], Any], slots: SharedSlots | None) -> None:
        self._make = make
        self._slots = slots

    def __getitem__(self, number: int) -> Any:
        try:
            item = self._make(number)
        except MellowError as error:
            return _Failure(error)
        worker = get_worker_info()
        return item if self._slots is None or worker is None else item.put_into(self._slots, worker.id)


class OrderedLoader(Generic[Item]):
    """The items `make(number)` for `numbers`, in that order."""

    def __init__(
        self,
        make: Callable[[int], Item],
        numbers: Iterable[int],
        num_workers: int,
        items_ahead: int,
        pin_memory: bool = False,
        slot_bytes: int = 0,
    ) -> None:
        """`num_workers` 0: items are made in this process when asked for; else `items_ahead` or more are kept ready.

        `slot_bytes` > 0: items are `LoadedBatch`es, whose waveforms pass through slots of that size where they fit.
        """
        self._iterator: Iterator[Any]
        self._slots: SharedSlots | None = None
        self._pin_memory = pin_memory
        if num_workers == 0:
            self._iterator = map(make, numbers)
            return
        ahead = max(2, -(-items_ahead // num_workers))  # of each process
        if slot_bytes and SharedSlots.are_supported():
            self._slots = SharedSlots(num_workers, ahead + 1, slot_bytes)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mellow_ds.data.stream"])
        self._iterator = iter(
            DataLoader(
                _Items(make, self._slots),
                batch_size=None,
                sampler=numbers,
                num_workers=num_workers,
                prefetch_factor=ahead,
                multiprocessing_context=context,
                worker_init_fn=_start_worker,
                persistent_workers=True,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # the DataLoader draws from it; the trainer's stays as it is
            )
        )
        # before multiprocessing's own end, which waits for processes that do not heed SIGTERM at once
        weakref.finalize(self, _shut_down, self._iterator)

    def __iter__(self) -> "OrderedLoader[Item]":
        return self

    def __next__(self) -> Item:
        try:
            item = next(self._iterator)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # a process that is killed while it hands something over resets the connection; else the DataLoader notices
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise FaultError(
                f"a loader process died ({reason}): it was killed, most often for memory; lower train.num_workers or "
                "train.batch_size"
            ) from error
        if isinstance(item, _Failure):
            raise item.error from RuntimeError(f"in a loader process:\n{item.trace}")
        return item if self._slots is None else item.taken_from(self._slots, self._pin_memory)

    def close(self) -> None:
        """End the loader processes."""
        _shut_down(self._iterator)


def _shut_down(iterator: Any) -> None:
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _start_worker(_: int) -> None:
    """Make this loader process end with the trainer, and leave signals that are meant for the trainer to it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End when the trainer has gone, however that came.

    The parent of this process is the fork server, which lives as long as any of its children: neither a signal at the
    parent's death nor a look at the parent's id would ever tell. The pipe to the trainer does.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "a loader process has a parent"
    multiprocessing.connection.wait([trainer.sentinel])
    os._exit(1)


def _end_soon(_signal_number: int, _frame: FrameType | None) -> None:
    """SIGTERM reaches every process of a preempted job: the trainer must still get the batch that it waits for."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS_AFTER_SIGTERM)
