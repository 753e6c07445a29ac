"""The launcher's end of the line to one host's agent. Nothing here waits: the watch asks when something has come."""

import contextlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

from mellow_ds.launcher.plan import HostPlan
from mellow_ds.launcher.wire import Lines, Message, decode, encode

_READ_BYTES = 65_536
_LAST_LINES = 10
_MAX_WAITING_BYTES = 1 << 16  # of orders that the host does not take: no more beats are added

State = Literal["connecting", "ready", "running", "done", "lost"]


class Connection:
    """A host's agent as a child process: ssh, or the agent itself."""

    def __init__(self, host: HostPlan, command: Sequence[str]) -> None:
        """Starts the command; it has a session of its own, so that Ctrl-C reaches the launcher only."""
        self.host = host
        self.state: State = "connecting"
        self.why = ""  # it was lost, or cannot be used
        self.port = 0  # where the ranks meet, as the first host's agent says
        self.heard = time.monotonic()
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)  # that no agent wrote: of ssh or of a shell there
        self.codes: dict[int, int] = {}  # exit code by rank, of those that have ended
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._input = self._process.stdin.fileno()
        self.output, self.errors = self._process.stdout.fileno(), self._process.stderr.fileno()
        for descriptor in (self._input, self.output, self.errors):
            os.set_blocking(descriptor, False)
        self._lines = {self.output: Lines(0, only_newlines=True), self.errors: Lines()}
        self._waiting = b""

    @property
    def is_over(self) -> bool:
        """Nothing more will come of it."""
        return self.state in ("done", "lost")

    def send(self, order: Message) -> None:
        """Give an order; what the host does not take at once follows with later ones."""
        if order["do"] != "beat" or len(self._waiting) < _MAX_WAITING_BYTES:
            self._waiting += encode(order)
        # a broken pipe is heard of at the other end, with its reason
        with contextlib.suppress(OSError):
            while self._waiting:
                self._waiting = self._waiting[os.write(self._input, self._waiting) :]

    def read(self, descriptor: int) -> Iterator[Message | str | None]:
        """What has come: messages of the agent, lines of ssh or a shell, None at the end of the stream."""
        lines = self._lines[descriptor]
        try:
            data = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.heard = time.monotonic()
        for line in [*lines.add(data), *([] if data else lines.rest())]:
            message = decode(line)
            if message is None:
                text = line.decode("utf-8", errors="replace")
                self.last_lines.append(text)
                yield text
            else:
                yield message
        if not data:
            yield None

    def exit_code(self, seconds: float = 1.0) -> int | None:
        """Of the child process; None where it does not end in time."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Leave the host: its agent, if it still runs, hears the end of its input and ends its ranks."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            if self.state == "done" and self.exit_code() is not None:
                return
            self._process.terminate()
            if self.exit_code() is None:
                self._process.kill()
                self._process.wait()
