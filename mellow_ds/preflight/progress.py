"""What each rank is at, known to all of them: where one does not come to a collective, the others name it and end."""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from mellow_ds.errors import EXIT_FAULT
from mellow_ds.world import World

_STORE_SECONDS = 5.0  # for an answer of the store where the ranks met


class Progress:
    """What this rank is at, known to the others, and a watch that ends it where the others do not come."""

    def __init__(self, world: World, timeout_seconds: float, say_last: Callable[[], None] = lambda: None) -> None:
        """`say_last`: called before this process is ended."""
        self._world, self._timeout, self._say_last = world, timeout_seconds, say_last
        self._store: dist.TCPStore | None = None
        self._what, self._number = "", 0
        self._since = time.monotonic()
        self._is_closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def connect(self) -> None:
        """Use the store where the ranks met, beside the process group's own connection."""
        if self._world.size == 1:
            return
        address, port = self._world.rendezvous(os.environ)
        wait = datetime.timedelta(seconds=_STORE_SECONDS)
        self._store = dist.TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)

    def at(self, what: str) -> None:
        """This rank begins with `what`."""
        self._what, self._number, self._since = what, self._number + 1, time.monotonic()
        if self._store is not None:
            self._store.set(f"mellow/{self._world.rank}", f"{self._number} {what}")

    def is_barrier_right(self) -> bool:
        """Whether all ranks had come to the barrier when this one passed it."""
        if self._store is None:
            dist.barrier()
            return True
        time.sleep(0.02 * (self._world.rank % 4))
        self._store.set(f"mellow/barrier/{self._world.rank}", "come")
        dist.barrier()
        return bool(self._store.check([f"mellow/barrier/{rank}" for rank in range(self._world.size)]))

    def close(self) -> None:
        """All is over."""
        self._is_closed.set()

    def fail(self, why: str) -> NoReturn:
        """End this rank, saying who is behind."""
        self._is_closed.set()
        at, behind = self._standing()
        self._say_last()
        what = f"{behind} ({why})" if behind else why
        print(f"verdict: FAILED at {at}: {what}", flush=True)
        who = f"rank {self._world.rank} ({socket.gethostname()})"
        print(f"error: {who}, at {self._what}: {what}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAULT)

    def _watch(self) -> None:
        while not self._is_closed.wait(0.2):
            if time.monotonic() - self._since > self._timeout:
                self.fail(f"the other ranks did not come within {self._timeout:.0f} s")

    def _standing(self) -> tuple[str, str]:
        """What the foremost rank is at, and in words the ranks that have not come as far.

        The same from whichever rank it is asked: one that stands still outside a collective notices as well that time
        is up, and may be the first to say so.
        """
        places = {self._world.rank: (self._number, self._what)}
        if self._store is not None:
            for rank in range(self._world.size):
                with contextlib.suppress(RuntimeError):  # rank 0, whose store it is, may be gone
                    places[rank] = self._place_of(self._store, rank)
        foremost, at = max(places.values())
        behind = [
            f"rank {rank} is still at {what}" if number else f"rank {rank} has not begun"
            for rank, (number, what) in sorted(places.items())
            if number < foremost
        ]
        return at, ", ".join(behind)

    @staticmethod
    def _place_of(store: dist.TCPStore, rank: int) -> tuple[int, str]:
        key = f"mellow/{rank}"
        if not store.check([key]):
            return 0, ""
        number, _, what = store.get(key).decode().partition(" ")
        return int(number), what
