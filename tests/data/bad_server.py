"""A real web server on 127.0.0.1 that serves a folder badly, as told, and writes down what it was asked for."""

import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = Callable[["Handler", bytes, int], None]  # (handler, whole file, first byte asked for)


class BadServer:
    """`faults[NAME]` holds what happens to the next requests for a file, one after the other; then all goes well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[Answer]] = defaultdict(list)
        self.always: dict[str, Answer] = {}
        self.asked: list[tuple[str, int]] = []  # (name, first byte)
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.owner = self  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/some/shards"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, name: str) -> int:
        """Requests for a file so far."""
        with self.lock:
            return sum(asked == name for asked, _ in self.asked)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Any
    timeout = 30

    def do_GET(self) -> None:
        owner: BadServer = self.server.owner
        name = self.path.partition("?")[0].rpartition("/")[2]
        asked = self.headers.get("Range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        with owner.lock:
            owner.asked.append((name, start))
            owner.headers.append(dict(self.headers))
            owner.paths.append(self.path)
            answer = owner.faults[name].pop(0) if owner.faults[name] else owner.always.get(name, well)
        path = owner.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        try:
            answer(self, path.read_bytes(), start)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def start(self, content: bytes, start: int, length: int | None = None) -> bytes:
        """Send the head of an answer; the body that belongs to it. `length`: what the head says instead."""
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def well(handler: Handler, content: bytes, start: int) -> None:
    """All of it, from where it was asked for."""
    if start >= len(content):
        handler.send_error(416)
        return
    handler.wfile.write(handler.start(content, start))


def without_ranges(handler: Handler, content: bytes, _start: int) -> None:
    """All of it, whatever was asked for."""
    handler.wfile.write(handler.start(content, 0))


def drop(after: int) -> Answer:
    """The connection is reset after so many bytes of the body."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        handler.wfile.write(handler.start(content, start)[:after])
        handler.wfile.flush()
        time.sleep(0.05)  # a reset takes with it what is still on its way
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return answer


def cut(after: int, admitted: bool) -> Answer:
    """The body ends after so many bytes; the head says so, or promises all."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        handler.wfile.write(handler.start(content, start, after if admitted else None)[:after])

    return answer


def delay(seconds: float, after: int = 0) -> Answer:
    """Nothing comes for a while, in the middle of the body."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        body = handler.start(content, start)
        handler.wfile.write(body[:after])
        time.sleep(seconds)
        handler.wfile.write(body[after:])

    return answer


def trickle(handler: Handler, content: bytes, start: int) -> None:
    """A byte now and then."""
    for byte in handler.start(content, start):
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def paced(pieces: int, seconds: float) -> Answer:
    """In so many pieces, over so many seconds."""

    def answer(handler: Handler, content: bytes, start: int) -> None:
        body = handler.start(content, start)
        step = -(-len(body) // pieces)
        for place in range(0, len(body), step):
            handler.wfile.write(body[place : place + step])
            time.sleep(seconds / pieces)

    return answer


def status(code: int, **headers: str) -> Answer:
    """An error."""

    def answer(handler: Handler, _content: bytes, _start: int) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def wrong(handler: Handler, content: bytes, start: int) -> None:
    """As many bytes, one of them another."""
    body = bytearray(handler.start(content, start))
    body[len(body) // 2] ^= 0xFF
    handler.wfile.write(body)


def longer(handler: Handler, content: bytes, _start: int) -> None:
    """More bytes than there should be."""
    well(handler, content + b"more", 0)
