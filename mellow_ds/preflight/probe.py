"""What the doctor starts on each host: answers the launcher's questions about it, and leaves nothing behind.

    python -m mellow_ds.preflight.probe      questions on standard input, answers on standard output (launcher/wire.py)

It becomes what a rank would be: the same interpreter, variables and folder. Whatever may hang (a file system, a driver,
a connection) is looked at in a thread of its own, and answered when it comes. It ends with the connection, and by
itself where nothing more is asked.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mellow_ds.launcher.wire import Message, encode

_READ_BYTES = 65_536
_SILENCE_SECONDS = 60  # without a question: the launcher is gone, and its connection does not say so
_REACH_SECONDS = 3.0  # for a connection to another host
_WORD_BYTES = 64
_BECOME = "--as-a-rank"


def main(arguments: Sequence[str]) -> NoReturn:
    """Answer until the connection closes."""
    signal.alarm(_SILENCE_SECONDS)
    if _BECOME not in arguments:
        _become_a_rank(_first_line())
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        Probe().run()
    finally:
        os._exit(0)  # threads that hang are not waited for


def _first_line() -> Message:
    """The first order, and not a byte more: what follows is for the program that this becomes."""
    import json

    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(0)
        line += byte
    order = json.loads(line)
    assert isinstance(order, dict)
    return order


def _become_a_rank(order: Message) -> None:
    """Go on in this process with the variables and the folder of a rank."""
    environment = {**order["under"], **os.environ, **order["over"]}
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), root])
    os.execve(sys.executable, [sys.executable, "-m", "mellow_ds.preflight.probe", _BECOME], environment)


class Probe:
    """Questions and answers."""

    def __init__(self, questions: int = 0, answers: int = 1) -> None:
        """`questions`, `answers`: file descriptors of the connection."""
        self._questions, self._answers = questions, answers
        self._lock = threading.Lock()  # one answer at a time
        self._marks: list[Path] = []  # files that this one has made
        self._listeners: list[socket.socket] = []

    def run(self) -> None:
        """Until nothing more is asked."""
        import json

        self._answer({"is": "hello"})
        waiting = b""
        try:
            while data := os.read(self._questions, _READ_BYTES):
                *lines, waiting = (waiting + data).split(b"\n")
                for line in lines:
                    signal.alarm(_SILENCE_SECONDS)
                    if self._obey(json.loads(line)):
                        return
        finally:
            self._unmark()

    def _obey(self, order: Message) -> bool:
        """Do as asked; True where that was the last."""
        what = order["do"]
        if what == "time":
            self._answer({"is": "time", "at": time.time()})
        elif what == "look":
            self._look(order)
        elif what == "mark":
            for folder in order["folders"]:
                self._start(self._mark, folder, order["name"], order["word"])
        elif what == "find":
            for folder in order["folders"]:
                self._start(self._find, folder, order["name"])
        elif what == "listen":
            self._listen(order)
        elif what == "reach":
            for target in order["targets"]:
                self._start(self._reach, target["name"], target["address"], target["port"])
        elif what == "end":
            self._unmark()
            self._answer({"is": "done"})
            return True
        return False

    def _start(self, action: Any, *words: Any) -> None:
        threading.Thread(target=action, args=words, daemon=True).start()

    # -- the host -----------------------------------------------------------------------------------------------------

    def _look(self, order: Message) -> None:
        from mellow_ds.preflight.look import looks

        folder = Path(order["folder"])
        clone = (folder / "mellow_ds" / "__init__.py").is_file()  # a script there would import that one
        root = folder if clone else Path(__file__).resolve().parent.parent.parent
        subjects = looks(root, order["folders"], order["shards"])
        self._answer({"is": "looking", "at": list(subjects)})
        for name, look in subjects.items():
            self._start(self._look_at, name, look)

    def _look_at(self, name: str, look: Any) -> None:
        from mellow_ds.preflight.facts import as_message

        try:
            self._answer({"is": "fact", "of": name, "value": as_message(look())})
        except Exception as error:  # a host of any kind: what it cannot tell is told as that
            self._answer({"is": "unknown", "of": name, "why": f"{type(error).__name__}: {error}"})

    # -- shared folders -----------------------------------------------------------------------------------------------

    def _mark(self, folder: str, name: str, word: str) -> None:
        """Leave a file with a word there, that the other hosts look for."""
        file = Path(folder) / name
        try:
            with file.open("x", encoding="ascii") as stream:
                self._marks.append(file)
                stream.write(word)
                stream.flush()
                os.fsync(stream.fileno())
            why = ""
        except OSError as error:
            why = error.strerror or str(error)
        self._answer({"is": "marked", "folder": folder, "why": why})

    def _find(self, folder: str, name: str) -> None:
        word = ""
        with contextlib.suppress(OSError):
            next(Path(folder).iterdir(), None)  # has an NFS client ask its server
            word = (Path(folder) / name).read_text(encoding="ascii")
        self._answer({"is": "found", "folder": folder, "word": word, "is_there": Path(folder).is_dir()})

    def _unmark(self) -> None:
        for file in self._marks:
            with contextlib.suppress(OSError):
                file.unlink()
        self._marks.clear()

    # -- the network --------------------------------------------------------------------------------------------------

    def _listen(self, order: Message) -> None:
        """Listen at a port of the system's choice, and where ranks are to meet here at that one too."""
        word, why, port = order["word"], "", 0
        if order["port"]:
            try:
                port = self._serve(order["port"], word)
            except OSError as error:
                why = os.strerror(error.errno or 0)
                port = self._serve(0, word)
        self._answer({"is": "listening", "meeting": port, "why": why, "any": self._serve(0, word)})

    def _serve(self, port: int, word: str) -> int:
        from mellow_ds.launcher.agent import listen_at

        listener = listen_at(port)
        self._listeners.append(listener)
        self._start(self._greet, listener, word)
        return int(listener.getsockname()[1])

    def _greet(self, listener: socket.socket, word: str) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                connection.settimeout(_REACH_SECONDS)
                with connection:
                    connection.sendall(word.encode("ascii"))
            except TimeoutError:
                continue
            except OSError:
                return

    def _reach(self, name: str, address: str, port: int) -> None:
        """Connect, and read the word that says who is there."""
        answer: Message = {"is": "reached", "name": name, "word": "", "why": "", "own": "", "peer": ""}
        began = time.monotonic()
        try:
            with socket.create_connection((address, port), timeout=_REACH_SECONDS) as connection:
                connection.settimeout(_REACH_SECONDS)
                answer["own"], answer["peer"] = connection.getsockname()[0], connection.getpeername()[0]
                answer["seconds"] = time.monotonic() - began
                word = b""
                while len(word) < _WORD_BYTES and (piece := connection.recv(_WORD_BYTES)):
                    word += piece
                answer["word"] = word.decode("ascii", errors="replace")
        except TimeoutError:
            answer["why"] = f"no answer within {_REACH_SECONDS:.0f} s"
        except OSError as error:
            answer["why"] = error.strerror or str(error)
        self._answer(answer)

    def _answer(self, message: Message) -> None:
        data = encode(message, marked=True)
        with self._lock:
            while data:
                try:
                    data = data[os.write(self._answers, data) :]
                except OSError:
                    os._exit(1)  # nobody listens


if __name__ == "__main__":
    main(sys.argv[1:])
