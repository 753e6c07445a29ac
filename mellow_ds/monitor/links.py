"""Connections from the ranks of other hosts to rank 0, by which each side notices that the other is gone.

The kernel of a host closes the connections of a process that was killed; of a host that is off, or cut off, it hears
nothing when it asks. Of the collectives gloo notices the first and NCCL neither, and launchers end the ranks that they
can reach. Nothing is sent in between but what the kernels ask one another: a rank that computes, compiles or is
suspended answers.
"""

import contextlib
import errno
import logging
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

_PROBE_SECONDS = 4  # between two questions of the kernel, where nothing else is heard
# Questions without an answer. The ranks of a lost host wait for one more: what rank 0 says of it comes first. Both are
# later than `mellow-ds launch`, which may start again without the host, and all is over in 30 s.
_MAX_PROBES_OF_MAIN = 4
_MAX_PROBES = 5
_MEETING_SECONDS = 30.0
_HELLO_SECONDS = 2.0
_HELLO = struct.Struct("!QI")  # the run's token, the rank
_BYE = b"."
_UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)
_log = logging.getLogger("mellow_ds.monitor")


class Loss(NamedTuple):
    """A rank that is gone without a word."""

    rank: int
    is_host: bool  # its host does not answer; else its process has ended
    at: float  # when that was noticed, on `time.monotonic`


class Links:
    """The connections of one rank. On one host there are none: there, processes see one another."""

    def __init__(self, rank: int = 0, hosts: Sequence[int] = ()) -> None:
        """`hosts`: [world] of each rank, the number of its host. Rank 0 listens from here on."""
        self.loss: Loss | None = None  # the first one
        self._rank = rank
        self._far = {other for other, host in enumerate(hosts) if host != hosts[0]}
        self._is_closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._ranks: dict[socket.socket, int] = {}  # that are connected
        self._left: set[int] = set()  # that have said that they are done
        self._listener = _listen() if rank == 0 and self._far else None
        self._token = secrets.randbits(62)  # of those that may connect

    @property
    def invitation(self) -> tuple[int, int]:
        """(port, token) of rank 0, which the others have to be told; (0, ...) where there is nothing to connect."""
        return self._listener.getsockname()[1] if self._listener else 0, self._token

    def meet(self, address: str, invitation: tuple[int, int]) -> None:
        """Connect, and watch from now on; does not wait. `address`: of rank 0's host."""
        port, self._token = invitation
        if self._listener is not None:
            threading.Thread(target=self._receive, args=(self._listener,), name="links", daemon=True).start()
        elif port and self._rank in self._far:
            threading.Thread(target=self._visit, args=(address, port), name="links", daemon=True).start()

    def close(self) -> None:
        """Say that this rank is done: its end is none of a fault."""
        self._is_closing.set()
        for connection in list(self._ranks):
            with contextlib.suppress(OSError):
                connection.sendall(_BYE)

    def _receive(self, listener: socket.socket) -> None:
        """Rank 0: let those in that know the token, then watch them."""
        wanted = set(self._far)
        deadline = time.monotonic() + _MEETING_SECONDS
        with listener:
            while wanted and time.monotonic() < deadline and not self._is_closing.is_set():
                listener.settimeout(1.0)
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    rank = self._hear_hello(connection)
                    if rank in wanted:
                        wanted.remove(rank)
                        self._hold(connection, rank, _MAX_PROBES_OF_MAIN)
                    else:
                        connection.close()
        if wanted and not self._is_closing.is_set():
            _say_unlinked(f"ranks {', '.join(map(str, sorted(wanted)[:8]))} cannot connect to rank 0")
        self._watch()

    def _hear_hello(self, connection: socket.socket) -> int:
        connection.settimeout(_HELLO_SECONDS)
        said = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        token, rank = _HELLO.unpack(said) if len(said) == _HELLO.size else (-1, -1)
        return rank if token == self._token else -1

    def _visit(self, address: str, port: int) -> None:
        """Another rank: connect to rank 0, then watch it."""
        try:
            connection = socket.create_connection((address, port), timeout=_MEETING_SECONDS / 3)
            connection.sendall(_HELLO.pack(self._token, self._rank))
        except OSError as error:
            _say_unlinked(f"rank {self._rank} cannot connect to {address}:{port} ({error.strerror or error})")
            return
        self._hold(connection, 0, _MAX_PROBES)
        self._watch()

    def _hold(self, connection: socket.socket, rank: int, max_probes: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("KEEPIDLE", _PROBE_SECONDS), ("KEEPINTVL", _PROBE_SECONDS), ("KEEPCNT", max_probes)):
            if hasattr(socket, f"TCP_{name}"):  # or as the system asks, which may be hours later
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
        self._ranks[connection] = rank
        self._selector.register(connection, selectors.EVENT_READ)

    def _watch(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                self._hear(connection, self._ranks[connection])

    def _hear(self, connection: socket.socket, rank: int) -> None:
        is_host = False
        try:
            if connection.recv(1):
                self._left.add(rank)
                return
        except OSError as error:
            is_host = error.errno in _UNREACHABLE
        if rank not in self._left and not self._is_closing.is_set() and self.loss is None:
            self.loss = Loss(rank, is_host, time.monotonic())
        self._selector.unregister(connection)
        del self._ranks[connection]
        connection.close()


def _listen() -> socket.socket | None:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", 0), backlog=1024)
    except OSError as error:
        _say_unlinked(f"rank 0 cannot listen to the others ({error.strerror or error})")
        return None


def _say_unlinked(what: str) -> None:
    _log.warning("%s: where a host is lost, train.hang_seconds alone notices it", what)
