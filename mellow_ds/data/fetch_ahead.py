"""Downloads ahead: threads that bring shards to this machine before they are needed.

They end with the process: a download that is under way then stays as a part, which the next one goes on with.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable

_MAX_IN_FLIGHT = 2  # downloads of a process; a node has as many as it has ranks times this


class FetchAhead:
    """Calls `fetch(number)` for numbers in the order in which they were asked for, in the background."""

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._lock = threading.Condition()
        self._waiting: deque[int] = deque()
        self._in_flight: set[int] = set()
        self._errors: dict[int, Exception] = {}
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def ask(self, numbers: Iterable[int]) -> None:
        """Put these in place of all that still wait; returns at once."""
        with self._lock:
            self._waiting = deque(n for n in dict.fromkeys(numbers) if n not in self._in_flight)
            missing = min(_MAX_IN_FLIGHT - len(self._threads), len(self._waiting))
            for _ in range(missing):
                # daemons: nothing waits for them at the end, and no lock of theirs outlives the process
                thread = threading.Thread(target=self._work, name="fetch-ahead", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._lock.notify_all()

    def close(self) -> None:
        """End the threads, each after what it has under way; waits for none."""
        with self._lock:
            self._waiting.clear()
            self._is_closed = True
            self._lock.notify_all()

    def raise_error_of(self, number: int) -> None:
        """Raise, once, what fetching `number` ended with."""
        with self._lock:
            error = self._errors.pop(number, None)
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting:
                    if self._is_closed:
                        return
                    self._lock.wait()
                number = self._waiting.popleft()
                self._in_flight.add(number)
                self._errors.pop(number, None)
            error: Exception | None = None
            try:
                self._fetch(number)
            except Exception as found:  # shown where the shard is needed; whatever it is, the thread goes on
                error = found
            with self._lock:
                self._in_flight.discard(number)
                if error is not None:
                    self._errors[number] = error
