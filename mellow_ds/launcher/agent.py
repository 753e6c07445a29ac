"""What the launcher starts on each host: starts the host's ranks, relays what they say, and lets none outlive the run.

    python -m mellow_ds.launcher.agent      orders on standard input, answers on standard output (wire.py)

The ranks are ended (SIGTERM, a grace, SIGKILL) when the launcher says so, when its end of the connection closes, when
it has not been heard for `SILENCE_SECONDS`, and when this process is told to end. Two processes: the agent, and above
it a guard that sweeps up where the agent itself is killed. Both adopt the orphans of their ranks, so what is swept are
descendants of this run and never a process of somebody else. Standard library only.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from mellow_ds.launcher.wire import (
    BEAT_SECONDS,
    LOST_GRACE_SECONDS,
    SILENCE_SECONDS,
    Lines,
    Message,
    encode,
)
from mellow_ds.monitor.process_id import ProcessId, descendants

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_READ_BYTES = 65_536
_MAX_WAITING_BYTES = 1 << 20  # of output that the launcher has not taken: beyond it the ranks wait
_LEFTOVER_SECONDS = 2.0  # that helpers of ended ranks (loader workers, resource trackers) have to end by themselves
_FLUSH_SECONDS = 5.0
_CANNOT_START = 127  # the code that shells give
_GONE_SECONDS = 20.0  # that ranks of an attempt before get to end, once their host is reached again
_OUTER_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # of launchers that this one was started by: see world.py
_TICK_SECONDS = 0.1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def main() -> int:
    """Be the guard of a host's agent until the run is over there."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    parent = os.getpid()
    agent_pid = os.fork()
    if agent_pid == 0:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # a fork does not inherit it
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        code = 1
        with contextlib.suppress(KeyboardInterrupt):
            code = Agent().run() if os.getppid() == parent else 1
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stderr.flush()
        os._exit(code)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent_pid, number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, pass_on)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # the connection is the agent's: it closes when the agent ends
    os.dup2(nothing, 1)
    _, status = os.waitpid(agent_pid, 0)
    sweep(LOST_GRACE_SECONDS)
    return os.waitstatus_to_exitcode(status) & 0xFF


def sweep(grace_seconds: float) -> None:
    """End every descendant of this process: SIGTERM, then after the grace SIGKILL, until none is left."""
    deadline = time.monotonic() + grace_seconds
    for process in _living():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
    while left := _living():
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
        time.sleep(_TICK_SECONDS)
        _reap()


class Agent:
    """The ranks of one host, between the launcher's orders and its own watch over the connection."""

    def __init__(self, orders: int = 0, answers: int = 1) -> None:
        """`orders`, `answers`: file descriptors of the connection to the launcher."""
        self._orders, self._answers = orders, answers
        self._selector = selectors.DefaultSelector()
        self._order_lines = Lines(max_bytes=0, only_newlines=True)
        self._waiting = bytearray()  # answers that the launcher has not taken yet
        self._ranks: list[_Rank] = []
        self._held_port: socket.socket | None = None
        now = time.monotonic()
        self._heard, self._said, self._tidy_since = now, now, 0.0
        self._kill_at: float | None = None  # the ranks are being ended; from then on with SIGKILL
        self._told, self._is_told_on = 0, False  # by a signal to end; whether the launcher knows
        self._is_started = False
        self._is_connected = True

    def run(self) -> int:
        """Do as the launcher says until all is over on this host."""
        self._listen()
        while not self._is_over():
            for key, _ in self._selector.select(_TICK_SECONDS if self._kill_at or self._tidy_since else 1.0):
                key.data()
            self._look_around()
        self._answer({"is": "done"})
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self._waiting and self._is_connected and time.monotonic() < deadline:
            self._write()
            time.sleep(0.01)
        return 0

    # -- what wakes it ------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        for descriptor in (self._orders, self._answers):
            os.set_blocking(descriptor, False)
        woken, wakes = os.pipe()
        for descriptor in (woken, wakes):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._note_signal)
        self._selector.register(self._orders, selectors.EVENT_READ, self._read_orders)
        self._selector.register(woken, selectors.EVENT_READ, lambda: _read(woken))

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._told = self._told or number

    def _look_around(self) -> None:
        """What is due: an order to end, ended ranks, beats, a silent launcher, the end of a grace, waiting output."""
        now = time.monotonic()
        if self._told and not self._is_told_on:
            self._is_told_on = True
            name = signal.Signals(self._told).name
            self._answer(_problem(f"its processes are being ended ({name}), as when a host is shut down"))
            self._end(signal.SIGTERM, LOST_GRACE_SECONDS)
        for pid, status in _reap().items():
            for rank in self._ranks:
                if rank.pid == pid:
                    rank.code = os.waitstatus_to_exitcode(status)
                    for stream in rank.streams:
                        self._relay(rank, stream, is_last=True)
                    self._answer({"is": "ended", "rank": rank.number, "code": rank.code})
        if now - self._said > BEAT_SECONDS:
            self._answer({"is": "beat"})
        if now - self._heard > SILENCE_SECONDS and self._is_connected:
            self._lose(f"the launcher has not been heard for {SILENCE_SECONDS:.0f} s")
        if self._kill_at is not None and now > self._kill_at:
            for rank in self._living_ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
        self._write()
        self._watch_answers()
        for rank in self._ranks:
            for stream in rank.streams:
                self._watch_stream(rank, stream, len(self._waiting) < _MAX_WAITING_BYTES)

    def _is_over(self) -> bool:
        """No rank runs, none will, and nothing that a rank has started is left."""
        if self._living_ranks() or not (self._is_started or self._kill_at is not None):
            return False
        now = time.monotonic()
        self._tidy_since = self._tidy_since or now
        left = _living()
        is_hurried = self._kill_at is not None and now > self._kill_at
        if left and (is_hurried or now - self._tidy_since > _LEFTOVER_SECONDS):
            for process in left:
                process.kill()
        return not left

    # -- orders -------------------------------------------------------------------------------------------------------

    def _read_orders(self) -> None:
        data = _read(self._orders)
        if data is None:
            return
        if not data:
            self._selector.unregister(self._orders)
            self._lose("the connection to the launcher has closed")
            return
        for line in self._order_lines.add(data):
            self._obey(_read_order(line))
        self._heard = time.monotonic()  # after it has obeyed, which may take longer than a launcher may be silent

    def _obey(self, order: Message) -> None:
        what = order.get("do")
        if what == "prepare":
            self._answer(self._prepare(order))
        elif what == "start" and not self._is_started and self._kill_at is None:
            self._start(order)
        elif what == "stop":
            self._end(order["signal"], order["grace"])

    def _prepare(self, order: Message) -> Message:
        """Whether the ranks can be started here; on the first host, at which port they meet."""
        folder, script = Path(order["folder"]), order["script"]
        if not folder.is_dir():
            return _problem(f"the folder {folder} is not there: the run needs a folder that all hosts see")
        if script and not (folder / script).is_file():
            return _problem(f"{folder / script} is not there: the run needs a folder that all hosts see")
        if order["gone"] and not _wait_until_gone(order["gone"], _GONE_SECONDS):
            return _problem("ranks of the attempt before have not ended there")
        if order["is_master"]:
            return self._hold_port(order["port"], order["is_port_fixed"])
        try:
            socket.getaddrinfo(order["address"] or "localhost", order["port"])
        except OSError:
            return _problem(
                f"the address where the ranks meet, {order['address']}, is not known there: give --master-addr"
            )
        return {"is": "ready", "port": order["port"]}

    def _hold_port(self, port: int, is_fixed: bool) -> Message:
        """Take the port until the ranks start, so that no other run gets it meanwhile."""
        try:
            self._held_port = listen_at(port)
        except OSError as error:
            if is_fixed:
                why = os.strerror(error.errno or 0)
                return _problem(f"port {port} cannot be used there ({why}): give another --master-port")
            self._held_port = listen_at(0)
        return {"is": "ready", "port": self._held_port.getsockname()[1]}

    def _start(self, order: Message) -> None:
        self._is_started = True
        if self._held_port is not None:
            self._held_port.close()
        for place in order["ranks"]:
            own = {name: value for name, value in os.environ.items() if name not in _OUTER_MARKS}
            environment = {**order["under"], **own, **order["over"], **place["variables"]}
            try:
                process = subprocess.Popen(
                    order["command"], cwd=order["folder"], env=environment, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_rank_setup(os.getpid()),
                )  # fmt: skip
            except OSError as error:
                self._say(place["rank"], 2, f"error: cannot start {order['command'][0]}: {error.strerror}")
                self._answer({"is": "ended", "rank": place["rank"], "code": _CANNOT_START})
                continue
            rank = _Rank(place["rank"], process)
            self._ranks.append(rank)
            for stream in rank.streams:
                os.set_blocking(stream.descriptor, False)

    # -- endings ------------------------------------------------------------------------------------------------------

    def _lose(self, why: str) -> None:
        """The launcher is gone: nobody waits for these ranks."""
        self._is_connected = False
        self._end(signal.SIGTERM, LOST_GRACE_SECONDS)
        with contextlib.suppress(OSError):  # who read it is most likely gone as well
            print(f"mellow-ds launch: {why}; ending the ranks of this host", file=sys.stderr, flush=True)

    def _end(self, number: int, grace_seconds: float) -> None:
        kill_at = time.monotonic() + grace_seconds
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        for rank in self._living_ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def _living_ranks(self) -> "list[_Rank]":
        return [rank for rank in self._ranks if rank.code is None]

    # -- what the ranks say -------------------------------------------------------------------------------------------

    def _watch_answers(self) -> None:
        """Wake when the launcher takes what waits for it, while something does."""
        is_watched = self._answers in self._selector.get_map()
        if self._waiting and not is_watched:
            self._selector.register(self._answers, selectors.EVENT_WRITE, self._write)
        elif is_watched and not self._waiting:
            self._selector.unregister(self._answers)

    def _watch_stream(self, rank: "_Rank", stream: "_Stream", is_wanted: bool) -> None:
        if is_wanted and stream.is_open and not stream.is_watched:
            self._selector.register(stream.descriptor, selectors.EVENT_READ, lambda: self._relay(rank, stream))
            stream.is_watched = True
        elif stream.is_watched and not (is_wanted and stream.is_open):
            self._selector.unregister(stream.descriptor)
            stream.is_watched = False

    def _relay(self, rank: "_Rank", stream: "_Stream", is_last: bool = False) -> None:
        """Pass on what a rank has written; `is_last`: all of it, the rank has ended."""
        while stream.is_open:
            data = _read(stream.descriptor)
            if data is None:
                break
            for line in stream.lines.add(data):
                self._say(rank.number, stream.number, line.decode("utf-8", errors="replace"))
            if not data:
                stream.is_open = False
            elif not is_last:
                break
        if is_last or not stream.is_open:
            for line in stream.lines.rest():
                self._say(rank.number, stream.number, line.decode("utf-8", errors="replace"))

    def _say(self, rank: int, stream: int, text: str) -> None:
        self._answer({"is": "line", "rank": rank, "stream": stream, "text": text})

    def _answer(self, message: Message) -> None:
        if self._is_connected:
            self._waiting += encode(message, marked=True)
            self._said = time.monotonic()

    def _write(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._answers, self._waiting[:_READ_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self._waiting.clear()
            if self._is_connected:
                self._lose("the launcher no longer listens")


class _Stream:
    """Standard output (1) or error (2) of a rank."""

    def __init__(self, number: int, descriptor: int) -> None:
        self.number = number
        self.descriptor = descriptor
        self.lines = Lines()
        self.is_open = True
        self.is_watched = False


class _Rank:
    """A rank's process; its exit code once it has ended."""

    def __init__(self, number: int, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.number = number
        self.pid = process.pid
        self.code: int | None = None
        self.streams = [_Stream(1, process.stdout.fileno()), _Stream(2, process.stderr.fileno())]
        self._process = process  # holds the pipes open


def _rank_setup(agent_pid: int) -> Callable[[], None]:
    """What a rank's process does before it becomes the command (the agent has no threads: this is safe)."""

    def set_up() -> None:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != agent_pid:
            os._exit(1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)  # `launch &` of a script has them ignored

    return set_up


def listen_at(port: int) -> socket.socket:
    """A socket that listens as a rank's store will: on all addresses."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _wait_until_gone(launch_id: str, seconds: float) -> bool:
    """Until no process of this host has been started as a rank of `launch_id`; False where some stay."""
    mark = f"MELLOW_LAUNCH_ID={launch_id}".encode()
    deadline = time.monotonic() + seconds
    while _has_process_with(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(_TICK_SECONDS)
    return True


def _has_process_with(variable: bytes) -> bool:
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # of another user, or it has just ended
            if variable in path.read_bytes().split(b"\0"):
                return True
    return False


def _problem(what: str) -> Message:
    return {"is": "problem", "what": what}


def _read_order(line: bytes) -> Message:
    order = json.loads(line)
    assert isinstance(order, dict)
    return order


def _read(descriptor: int) -> bytes | None:
    """What is there; empty at the end of the stream, None where nothing has come."""
    try:
        return os.read(descriptor, _READ_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _reap() -> dict[int, int]:
    """Exit status by process number of the children, adopted ones too, that have ended."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def _living() -> list[ProcessId]:
    return [process for process in descendants(os.getpid()) if process.state() in ("runs", "stopped")]


def _prctl(option: int, value: int) -> None:
    if _libc is not None:
        _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
