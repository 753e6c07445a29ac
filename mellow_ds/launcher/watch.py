"""From the first connection to the last rank's end: start the hosts' agents, watch them, end all where one fails."""

import os
import re
import selectors
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER
from mellow_ds.launcher.connection import Connection
from mellow_ds.launcher.output import Output
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.launcher.remote import explain
from mellow_ds.launcher.wire import BEAT_SECONDS, LOST_GRACE_SECONDS, SILENCE_SECONDS, Message

_READY_SECONDS = 25.0  # from the start of ssh to the agent's answer
_ENV_FILE_READY_SECONDS = 600.0  # where a file is sourced first, which may build an environment
_OTHERS_SECONDS = 3.0  # that the other hosts get to say what is wrong with them, once one cannot be used
_SETTLE_SECONDS = 5.0  # that the other ranks get to end by themselves, in the words of the one that failed first
_DONE_SECONDS = 10.0  # beyond the grace, until a host has swept up
_TICK_SECONDS = 0.2
_ORDERLY = (EXIT_DONE, EXIT_STOPPED, EXIT_INTERRUPTED)
_BLAMED = re.compile(r"ended because rank (\d+) ")  # as mellow_ds/monitor/heartbeat.py puts it


@dataclass(frozen=True)
class _Failure:
    """What went wrong first."""

    what: str
    code: int
    rank: int | None = None  # None: a host was lost


class Watch:
    """One start of a run on all its hosts."""

    def __init__(
        self, plan: LaunchPlan, commands: Mapping[str, Sequence[str]], output: Output, stop_seconds: float
    ) -> None:
        """`commands`: what starts each host's agent; `stop_seconds`: that ranks get to save when told to stop."""
        self._plan, self._commands, self._output = plan, commands, output
        self._stop_seconds = stop_seconds
        self._connections: list[Connection] = []
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []  # that asked this process to stop, first one first
        self._num_heeded = 0
        self._failure: _Failure | None = None
        self._end_at: float | None = None  # when the ranks that are left are told to end
        self._over_at: float | None = None  # when hosts that have not swept up are given up
        self._beaten = 0.0

    def run(self) -> int:
        """Start, watch, end; returns the run's exit code. No process of the run is left, on hosts that are reached."""
        before = self._listen()
        try:
            for host in self._plan.hosts:
                self._connections.append(Connection(host, self._commands[host.name]))
            for connection in self._connections:
                for descriptor in (connection.output, connection.errors):
                    self._selector.register(descriptor, selectors.EVENT_READ, connection)
                connection.send(self._preparation(connection))
            if not self._wait_until_ready():
                return self._refusal()
            self._start()
            self._watch()
            return self._result()
        finally:
            self._leave()
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- before the ranks start ---------------------------------------------------------------------------------------

    def _listen(self) -> dict[int, Any]:
        """Take over the signals that stop a run; what stood there before."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        self._selector.register(woken, selectors.EVENT_READ, None)
        # Ctrl-Z would silence this process, and the hosts would take it for dead
        before: dict[int, Any] = {signal.SIGTSTP: signal.signal(signal.SIGTSTP, signal.SIG_IGN)}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            before[number] = signal.signal(number, self._note_signal)
        return before

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _preparation(self, connection: Connection) -> Message:
        plan = self._plan
        script = next((word for word in plan.command[:2] if word.endswith(".py")), "")
        return {
            "do": "prepare", "is_master": connection.host is plan.hosts[0], "address": plan.master_address,
            "port": plan.master_port, "is_port_fixed": plan.is_port_fixed, "folder": plan.folder, "script": script,
        }  # fmt: skip

    def _wait_until_ready(self) -> bool:
        """Until every host's agent has said that the ranks can start; False where one cannot, or a signal came."""
        seconds = _ENV_FILE_READY_SECONDS if self._plan.env_file else _READY_SECONDS
        deadline = time.monotonic() + seconds
        is_well = True
        while waiting := [c for c in self._connections if c.state == "connecting"]:
            self._step()
            now = time.monotonic()
            if self._signals:
                return False
            if is_well and any(connection.state == "lost" for connection in self._connections):
                is_well, deadline = False, min(deadline, now + _OTHERS_SECONDS)
            if now > deadline:
                if is_well:
                    for connection in waiting:
                        self._lose(connection, f"no answer within {seconds:.0f} s")
                return False
        return is_well and all(connection.state == "ready" for connection in self._connections)

    def _refusal(self) -> int:
        """Say why nothing was started."""
        if self._signals:
            self._output.note("stopped before a rank was started")
            return EXIT_INTERRUPTED if self._signals[0] == signal.SIGINT else EXIT_STOPPED
        for connection in self._connections:
            if connection.state == "lost":
                self._output.error(f"host {connection.host.name}: {connection.why}; no rank was started")
        return EXIT_USER

    def _start(self) -> None:
        plan = self._plan
        port = self._connections[0].port
        if port != plan.master_port:
            self._output.note(f"port {plan.master_port} of {plan.master_address} is in use: the ranks meet at {port}")
        own = {"PYTHONUNBUFFERED": "1", **plan.travelling.allowed}
        named = {**plan.travelling.named, **plan.interfaces()}
        for connection in self._connections:
            connection.send({
                "do": "start", "command": plan.command, "folder": plan.folder,
                # what an environment file sets on the host stands above what only happens to be set here
                "under": own if plan.env_file else {}, "over": named if plan.env_file else {**own, **named},
                "ranks": [{"rank": rank, "variables": plan.variables(rank, port)} for rank in connection.host.ranks],
            })  # fmt: skip
            connection.state = "running"

    # -- while they run -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not all(connection.is_over for connection in self._connections):
            self._step()
            now = time.monotonic()
            self._heed_signals()
            if self._end_at is not None and now > self._end_at:
                self._end_at = None
                self._stop_all(signal.SIGTERM, LOST_GRACE_SECONDS)
            if self._over_at is not None and now > self._over_at:
                for connection in self._connections:
                    if not connection.is_over:
                        self._lose(connection, "it has not ended its ranks in time")

    def _step(self) -> None:
        """Take what has come, send beats, look for hosts that are silent."""
        for key, _ in self._selector.select(_TICK_SECONDS):
            if key.data is None:
                os.read(key.fd, 4096)
                continue
            for item in key.data.read(key.fd):
                self._take(key.data, key.fd, item)
        now = time.monotonic()
        if now - self._beaten > BEAT_SECONDS:
            self._beaten = now
            for connection in self._connections:
                if not connection.is_over:
                    connection.send({"do": "beat"})
        for connection in self._connections:
            if connection.state == "running" and now - connection.heard > SILENCE_SECONDS:
                self._lose(connection, f"not heard for {SILENCE_SECONDS:.0f} s: it is off, or its link is cut")

    def _take(self, connection: Connection, descriptor: int, item: Message | str | None) -> None:
        if item is None:
            self._selector.unregister(descriptor)
            if descriptor == connection.output and not connection.is_over:
                self._note_end(connection)
        elif isinstance(item, str):
            self._output.host_line(connection.host.name, item)
        elif item["is"] == "line":
            self._output.rank_line(item["rank"], item["stream"], item["text"])
        elif item["is"] == "ended":
            self._note_rank_end(connection, item["rank"], item["code"])
        elif item["is"] == "ready":
            connection.state, connection.port = "ready", item["port"]
        elif item["is"] == "problem":
            self._lose(connection, item["what"])
        elif item["is"] == "done":
            connection.state = "done"

    def _note_end(self, connection: Connection) -> None:
        """The connection has ended without the agent's word that all is over."""
        code = connection.exit_code()
        if connection.errors in self._selector.get_map():  # its last words may still stand there
            for item in connection.read(connection.errors):
                if isinstance(item, str):
                    self._output.host_line(connection.host.name, item)
        self._lose(connection, explain(connection.last_lines, code))

    def _lose(self, connection: Connection, why: str) -> None:
        was_running = connection.state == "running"
        connection.state, connection.why = "lost", why
        if was_running and len(connection.codes) < connection.host.num_ranks:
            host = connection.host
            ranks = f"rank {host.first_rank}" if host.num_ranks == 1 else f"ranks {host.ranks[0]} to {host.ranks[-1]}"
            self._fail(_Failure(f"host {host.name} ({ranks}) is lost: {why}", EXIT_FAULT))

    def _note_rank_end(self, connection: Connection, rank: int, code: int) -> None:
        connection.codes[rank] = code
        is_asked = -code in self._signals or (-code == signal.SIGKILL and len(self._signals) > 1)
        if code in _ORDERLY or is_asked:
            return
        self._fail(_Failure(_describe(self._plan.label(rank), code), _shell_code(code), rank))

    def _fail(self, failure: _Failure) -> None:
        if self._failure is None:
            self._failure = failure
            # ranks of other hosts cannot end by themselves while one is silent: they wait for it
            self._end_at = time.monotonic() + (_SETTLE_SECONDS if failure.rank is not None else 0.0)

    def _heed_signals(self) -> None:
        """Pass on what asked for a stop; the second time all is ended at once."""
        if len(self._signals) == self._num_heeded:
            return
        is_first, self._num_heeded = self._num_heeded == 0, len(self._signals)
        if not is_first or self._failure is not None:
            self._output.note("ending all ranks at once")
            self._stop_all(signal.SIGKILL, 0.0)
            return
        number = self._signals[0]
        self._output.note(
            f"{signal.Signals(number).name}: every rank is told and waited for, {self._stop_seconds:.0f} s at most; "
            "once more ends them at once"
        )
        self._stop_all(signal.SIGTERM if number == signal.SIGHUP else number, self._stop_seconds)

    def _stop_all(self, number: int, grace_seconds: float) -> None:
        over_at = time.monotonic() + grace_seconds + _DONE_SECONDS
        self._over_at = over_at if self._over_at is None else min(over_at, self._over_at)
        for connection in self._connections:
            if not connection.is_over:
                connection.send({"do": "stop", "signal": int(number), "grace": grace_seconds})

    # -- the end ------------------------------------------------------------------------------------------------------

    def _result(self) -> int:
        codes = {rank: code for connection in self._connections for rank, code in connection.codes.items()}
        if self._failure is not None:
            return self._report(self._blame(self._failure, codes))
        by_signal = [_shell_code(code) for code in codes.values() if code < 0]
        ends = [code for code in (EXIT_INTERRUPTED, EXIT_STOPPED) if code in codes.values()]
        return (by_signal or ends or [EXIT_DONE])[0]

    def _blame(self, failure: _Failure, codes: Mapping[int, int]) -> _Failure:
        """The rank that failed first: where the one heard first names another one, that."""
        if failure.rank is None:
            return failure
        for line in reversed(self._output.last_lines[failure.rank]):
            named = _BLAMED.search(line)
            if named and codes.get(int(named[1]), 0) not in _ORDERLY:
                rank = int(named[1])
                return _Failure(_describe(self._plan.label(rank), codes[rank]), _shell_code(codes[rank]), rank)
        return failure

    def _report(self, failure: _Failure) -> int:
        """Show what failed first: its last lines, and as the very last line what they come to."""
        if failure.rank is None:
            self._output.error(f"{failure.what}; the other ranks were ended")
            return failure.code
        self._output.note(f"{failure.what}; the last that it said ({self._output.where(failure.rank)}):")
        self._output.repeat(failure.rank)
        said = [line for line in self._output.last_lines[failure.rank] if line.startswith("error: ")]
        message = f": {said[-1].removeprefix('error: ')}" if said else f"; {self._output.where(failure.rank)}"
        self._output.error(f"{failure.what}{message}")
        return failure.code

    def _leave(self) -> None:
        """Close the connections: agents that still run hear it, and end their ranks."""
        for connection in self._connections:
            if not connection.is_over:
                connection.send({"do": "stop", "signal": int(signal.SIGKILL), "grace": 0.0})
        for connection in self._connections:
            connection.close()
        signal.set_wakeup_fd(-1) if threading.current_thread() is threading.main_thread() else None
        self._selector.close()


def _shell_code(code: int) -> int:
    """A child's exit code as a shell gives it: 128 and the signal where one ended it."""
    return code if code >= 0 else 128 - code


def _describe(who: str, code: int) -> str:
    if code >= 0:
        return f"{who} ended with code {code}"
    return f"{who} was ended by {signal.Signals(-code).name} (code {_shell_code(code)})"
