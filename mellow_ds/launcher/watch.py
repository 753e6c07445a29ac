"""From the first connection to the last rank's end: start the hosts' agents, watch them, end all where one fails."""

import re
import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER
from mellow_ds.launcher.connection import Connection
from mellow_ds.launcher.output import Output
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.launcher.remote import explain
from mellow_ds.launcher.stop_signals import StopSignals
from mellow_ds.launcher.wire import BEAT_SECONDS, LOST_GRACE_SECONDS, SILENCE_SECONDS, Message

_READY_SECONDS = 25.0  # from the start of ssh to the agent's answer
_ENV_FILE_READY_SECONDS = 600.0  # where a file is sourced first, which may build an environment
_ROLL_CALL_SECONDS = 60.0  # for ranks of the attempt before to end (agent.py), or a file to be sourced that was once
_OTHERS_SECONDS = 3.0  # that the other hosts get to say what is wrong with them, once one cannot be used
_SETTLE_SECONDS = 5.0  # that the other ranks get to end by themselves, in the words of the one that failed first
_DONE_SECONDS = 10.0  # beyond the grace, until a host has swept up
# from the last sign of a host to the end of its ranks, by its own watch over the connection, wherever it is cut
_OUT_OF_SIGHT_SECONDS = SILENCE_SECONDS + LOST_GRACE_SECONDS + 2 * BEAT_SECONDS
_TICK_SECONDS = 0.2
_ORDERLY = (EXIT_DONE, EXIT_STOPPED, EXIT_INTERRUPTED)
_BLAMED = re.compile(r"ended because rank (\d+) ")  # as mellow_ds/monitor/heartbeat.py puts it


@dataclass(frozen=True)
class _Failure:
    """What went wrong first."""

    what: str
    code: int
    rank: int | None = None  # None: a host was lost


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    code: int
    refused: tuple[str, ...] = ()  # by hosts that could not be used: no rank was started
    lost: str = ""  # a host was lost while ranks ran: in words
    over_at: float = 0.0  # by the monotonic clock: a lost host that does not answer has ended its ranks by then


class Watch:
    """One attempt of a run on all its hosts."""

    def __init__(
        self, plan: LaunchPlan, commands: Mapping[str, Sequence[str]], output: Output, signals: StopSignals,
        stop_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        """`commands`: what starts each host's agent; `stop_seconds`: that ranks get to save when told to stop."""
        self._plan, self._commands, self._output = plan, commands, output
        self._stop_seconds = stop_seconds
        self._stop_signals = signals
        self._connections: list[Connection] = []
        self._selector = selectors.DefaultSelector()
        self._signals = signals.asked
        self._num_heeded = 0
        self._failure: _Failure | None = None
        self._loss: _Failure | None = None  # of a host; ranks of others may have failed of it before it was noticed
        self._over_by = 0.0
        self._end_at: float | None = None  # when the ranks that are left are told to end
        self._over_at: float | None = None  # when hosts that have not swept up are given up
        self._beaten = 0.0

    def run(self) -> End:
        """Start, watch, end. No process of the run is left, on hosts that are reached."""
        try:
            self._connect(is_roll_call=False)
            if not self._wait_until_ready():
                return self._refusal()
            self._start()
            self._watch()
            return self._result()
        finally:
            self._leave()

    def ask(self) -> dict[str, str]:
        """Which hosts could not start ranks now, and why. Ranks of the attempt before have ended on all others."""
        try:
            self._connect(is_roll_call=True)
            self._wait_until_ready(is_roll_call=True)
            return {c.host.name: c.why or "no answer" for c in self._connections if c.state != "ready"}
        finally:
            self._leave()

    # -- before the ranks start ---------------------------------------------------------------------------------------

    def _connect(self, is_roll_call: bool) -> None:
        self._selector.register(self._stop_signals, selectors.EVENT_READ, None)
        for host in self._plan.hosts:
            self._connections.append(Connection(host, self._commands[host.name]))
        for connection in self._connections:
            for descriptor in (connection.output, connection.errors):
                self._selector.register(descriptor, selectors.EVENT_READ, connection)
            connection.send(self._preparation(connection, is_roll_call))

    def _preparation(self, connection: Connection, is_roll_call: bool) -> Message:
        plan = self._plan
        script = next((word for word in plan.command[:2] if word.endswith(".py")), "")
        return {
            "do": "prepare", "is_master": not is_roll_call and connection.host is plan.hosts[0],
            # who is the first host, and where the ranks meet, follows from the roll call
            "address": "" if is_roll_call else plan.master_address, "port": plan.master_port,
            "is_port_fixed": plan.is_port_fixed, "folder": plan.folder, "script": script,
            "gone": plan.launch_id if is_roll_call else "",
        }  # fmt: skip

    def _wait_until_ready(self, is_roll_call: bool = False) -> bool:
        """Until every host's agent has said that the ranks can start; False where one cannot, or a signal came.

        A roll call hears all hosts; else what one cannot do decides, and the others are heard for a moment only.
        """
        seconds = _ENV_FILE_READY_SECONDS if self._plan.env_file else _READY_SECONDS
        if is_roll_call:
            seconds = _ROLL_CALL_SECONDS
        deadline = time.monotonic() + seconds
        is_well = True
        while waiting := [c for c in self._connections if c.state == "connecting"]:
            self._step()
            now = time.monotonic()
            if self._signals:
                return False
            is_refused = any(connection.state == "lost" for connection in self._connections)
            if is_well and is_refused and not is_roll_call:
                is_well, deadline = False, min(deadline, now + _OTHERS_SECONDS)
            if now > deadline:
                if is_well:
                    for connection in waiting:
                        self._lose(connection, f"no answer within {seconds:.0f} s")
                return False
        return is_well and all(connection.state == "ready" for connection in self._connections)

    def _refusal(self) -> End:
        """Why nothing was started."""
        if self._signals:
            self._output.note("stopped before a rank was started")
            return End(self._stop_signals.exit_code)
        lost = [connection for connection in self._connections if connection.state == "lost"]
        return End(EXIT_USER, tuple(f"host {connection.host.name}: {connection.why}" for connection in lost))

    def _start(self) -> None:
        plan = self._plan
        port = self._connections[0].port
        if plan.master_port and port != plan.master_port:
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
                        self._lose(connection, "it has not ended its ranks in time", is_gone=False)

    def _step(self) -> None:
        """Take what has come, send beats, look for hosts that are silent."""
        for key, _ in self._selector.select(_TICK_SECONDS):
            if key.data is None:
                self._stop_signals.clear()
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

    def _lose(self, connection: Connection, why: str, is_gone: bool = True) -> None:
        """`is_gone`: the host itself, and not only slow to end its ranks."""
        was_running = connection.state == "running"
        connection.state, connection.why = "lost", why
        if was_running and len(connection.codes) < connection.host.num_ranks:
            host = connection.host
            ranks = f"rank {host.first_rank}" if host.num_ranks == 1 else f"ranks {host.ranks[0]} to {host.ranks[-1]}"
            failure = _Failure(f"host {host.name} ({ranks}) is lost: {why}", EXIT_FAULT)
            if is_gone and self._loss is None:
                self._loss = failure
            if is_gone:
                self._over_by = max(self._over_by, connection.heard + _OUT_OF_SIGHT_SECONDS)
            self._fail(failure)

    def _note_rank_end(self, connection: Connection, rank: int, code: int) -> None:
        connection.codes[rank] = code
        asked = {_as_told(number) for number in self._signals}
        is_asked = -code in asked or (-code == signal.SIGKILL and len(self._signals) > 1)
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
        self._stop_all(_as_told(number), self._stop_seconds)

    def _stop_all(self, number: int, grace_seconds: float) -> None:
        over_at = time.monotonic() + grace_seconds + _DONE_SECONDS
        self._over_at = over_at if self._over_at is None else min(over_at, self._over_at)
        for connection in self._connections:
            if not connection.is_over:
                connection.send({"do": "stop", "signal": int(number), "grace": grace_seconds})

    # -- the end ------------------------------------------------------------------------------------------------------

    def _result(self) -> End:
        codes = {rank: code for connection in self._connections for rank, code in connection.codes.items()}
        if self._failure is not None:
            failure = self._loss or self._failure
            if failure.rank is None:
                return End(failure.code, lost=failure.what, over_at=self._over_by)
            return End(self._report(self._blame(failure, failure.rank, codes)))
        by_signal = [_shell_code(code) for code in codes.values() if code < 0]
        ends = [code for code in (EXIT_INTERRUPTED, EXIT_STOPPED) if code in codes.values()]
        return End((by_signal or ends or [EXIT_DONE])[0])

    def _blame(self, failure: _Failure, heard: int, codes: Mapping[int, int]) -> _Failure:
        """The rank that failed first: where the one heard first, `heard`, names another one, that.

        Where it said nothing, one that ended with the same code and said why: a mistake that all find is said by one.
        """
        lines = self._output.last_lines
        named = [int(found[1]) for line in lines[heard] if (found := _BLAMED.search(line))]
        blamed = [rank for rank in reversed(named) if codes.get(rank, 0) not in _ORDERLY]
        if not lines[heard]:
            blamed = [rank for rank, code in codes.items() if code == codes[heard] and self._output.errors(rank)]
        if not blamed:
            return failure
        rank = blamed[0]
        return _Failure(_describe(self._plan.label(rank), codes[rank]), _shell_code(codes[rank]), rank)

    def _report(self, failure: _Failure) -> int:
        """Show what failed first: its last lines, if there are more, and as the very last line what they come to."""
        assert failure.rank is not None
        errors, lines = self._output.errors(failure.rank), self._output.last_lines[failure.rank]
        if list(lines) != errors[-1:]:
            self._output.note(f"{failure.what}; the last that it said ({self._output.where(failure.rank)}):")
            self._output.repeat(failure.rank)
        message = f"; {self._output.where(failure.rank)}"
        if errors:
            message = ": " + errors[-1].removeprefix("error: ").removeprefix(f"rank {failure.rank}: ")
        self._output.error(f"{failure.what}{message}")
        return failure.code

    def _leave(self) -> None:
        """Close the connections: agents that still run hear it, and end their ranks."""
        for connection in self._connections:
            if not connection.is_over:
                connection.send({"do": "stop", "signal": int(signal.SIGKILL), "grace": 0.0})
        for connection in self._connections:
            connection.close()
        self._selector.close()


def _as_told(number: int) -> int:
    """The signal that the ranks get for one: they know no SIGHUP, which says the same as SIGTERM."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _shell_code(code: int) -> int:
    """A child's exit code as a shell gives it: 128 and the signal where one ended it."""
    return code if code >= 0 else 128 - code


def _describe(who: str, code: int) -> str:
    if code >= 0:
        return f"{who} ended with code {code}"
    return f"{who} was ended by {signal.Signals(-code).name} (code {_shell_code(code)})"
