"""A rank's heartbeat: what it is working on, in a file that the other ranks (and a person) can read.

    RUN/heartbeats/rank-00003.json        step, phase, examples in work, host, process; new each second
    RUN/heartbeats/rank-00003.stacks.txt  stack traces, once the run stood still
    RUN/heartbeats/endings.jsonl          who failed, first one first

The training thread only swaps an attribute; a thread of its own writes. Another one watches (`watchdog.py`).
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mellow_ds.errors import EXIT_FAULT, EXIT_INTERRUPTED, FaultError, MellowError
from mellow_ds.monitor.endings import Ending, add_ending, first_ending, make_endings, tell_torchrun
from mellow_ds.monitor.process_id import ProcessId
from mellow_ds.monitor.stacks import stacks_name
from mellow_ds.world import World

HEARTBEATS_NAME = "heartbeats"
ENDED = "ended"
# in the order in which a step goes through them; a phase that is not listed counts as the first
PHASES = ("start", "fetch", "forward-backward", "agree", "record", "save", "evaluate", "score", ENDED)
_START_SECONDS = 1800.0  # that loading a model, or compiling DeepSpeed's ops, may take without a sign
_MAX_ID_CHARACTERS = 2000  # of example ids in a record
_BLOCK_BYTES = 4096  # a record is padded to it: one write of one page, which a reader sees whole
_MAX_INTERVAL_SECONDS = 10.0
_RANKS_PER_SECOND = 100  # heartbeats that a run's file system gets, at most
_CLOSING_SECONDS = 5.0  # that a file system which hangs may hold up the end of a run
_FIRST_FAILURE_SECONDS = 3.0  # that a broken connection waits for the message of the rank that broke it
_log = logging.getLogger("mellow_ds.monitor")


class Beat(NamedTuple):
    """What a heartbeat file holds."""

    rank: int
    process: ProcessId
    beats: int  # written so far: a process that runs goes on counting
    progress: int  # times that the training thread has come to something new
    step: int  # the optimizer step in work, from 1; 0 before the first
    phase: str
    examples: tuple[str, ...] = ()  # the first of those in work
    num_examples: int = 0
    grace_seconds: float = 0.0  # that the phase may take beyond train.hang_seconds
    interval_seconds: float = 1.0  # between beats
    where: str = ""  # innermost call of the training thread, where it stands still
    waits: bool = False  # standing still in a collective, as far as `where` tells

    @property
    def place(self) -> tuple[int, int]:
        """How far the rank is, to be compared with others."""
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else 0


class Work(NamedTuple):
    """What the training thread does, as it says itself."""

    progress: int
    step: int
    phase: str
    batches: Sequence[Sequence[str]]  # example ids of the micro-batches
    grace_seconds: float


class Heartbeat:
    """A heartbeat that nobody hears, for tests and single calls. A context manager that closes itself."""

    def at(
        self,
        phase: str,
        step: int | None = None,
        batches: Sequence[Sequence[str]] = (),
        grace_seconds: float = 0.0,
    ) -> None:
        """The training thread begins `phase`, or has got further in it. Costs about a microsecond.

        `step`: the optimizer step in work, from 1; None: the one before. `batches`: example ids of its micro-batches.
        `grace_seconds`: how long this may take beyond train.hang_seconds (a compilation, a scoring in one piece).
        """

    def beat(self) -> None:
        """There is progress within the phase (a file written, a batch generated)."""

    def failed(self, error: BaseException) -> MellowError | None:  # noqa: ARG002 (it is nobody's here)
        """Tell the other ranks; returns what to say instead where the error is a consequence of another rank's."""
        return None

    @contextlib.contextmanager
    def hearing_failures(self) -> Iterator[None]:
        """What is raised within is told to the other ranks, or put in the words of the rank that failed first."""
        try:
            yield
        except BaseException as error:  # being stopped by a signal, too, ends what the others wait for
            lost = self.failed(error)
            if lost is None:
                raise
            raise lost from error

    def close(self) -> None:
        """The rank is done. May be called twice."""

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RankHeartbeat(Heartbeat):
    """The heartbeat of one rank of a run."""

    def __init__(self, folder: Path, world: World, process: ProcessId | None = None) -> None:
        """`folder`: RUN/heartbeats, which `make_heartbeats` has made. `process`: this one."""
        self.folder = folder
        self.world = world
        self.process = process or ProcessId.own()
        self.interval_seconds = interval_seconds(world.size)
        self.work = Work(0, 0, PHASES[0], (), _START_SECONDS)
        self.stands_at: tuple[str, bool] = ("", False)  # where it stands still; set by the watchdog
        self.has_failed = False
        self._beats = 0
        self._neighbours: dict[int, ProcessId] = {}
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._keep_writing, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._writer.start()

    def at(
        self,
        phase: str,
        step: int | None = None,
        batches: Sequence[Sequence[str]] = (),
        grace_seconds: float = 0.0,
    ) -> None:
        """See `Heartbeat.at`."""
        work = self.work
        self.work = Work(work.progress + 1, work.step if step is None else step, phase, batches, grace_seconds)

    def beat(self) -> None:
        """See `Heartbeat.beat`."""
        self.work = self.work._replace(progress=self.work.progress + 1)

    def failed(self, error: BaseException) -> MellowError | None:
        """See `Heartbeat.failed`."""
        self.has_failed = True
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            code = error.code if isinstance(error, SystemExit) else EXIT_INTERRUPTED
            stopped = Ending(
                self.world.rank, "stopped by a signal", code if isinstance(code, int) else EXIT_FAULT, "stop"
            )
            self.add_ending(stopped)
            return None
        if not isinstance(error, MellowError):
            lost = self._consequence_of(error)
            if lost is not None:
                return lost
        ending = Ending(self.world.rank, one_line(error), getattr(error, "exit_code", EXIT_FAULT))
        tell_torchrun(f"rank {ending.rank}: {ending.message}", os.environ.get("TORCHELASTIC_ERROR_FILE"))
        self.add_ending(ending)
        return None

    def add_ending(self, ending: Ending) -> None:
        """Tell the other ranks, as far as the file system lets."""
        try:
            add_ending(self.folder, ending)
        except OSError as problem:
            _log.warning("%s cannot be written (%s): the other ranks are not told", self.folder, problem.strerror)

    def _consequence_of(self, error: BaseException) -> MellowError | None:
        """What another rank ended of; None where no rank can be found that ended before."""
        if self.world.size == 1:
            return None
        deadline = time.monotonic() + _FIRST_FAILURE_SECONDS
        while True:
            first = first_ending(self.folder)
            if first is not None:
                return None if first.rank == self.world.rank else quoted(first)
            gone = self.gone_neighbour()
            if gone is not None:
                ending = ending_of_gone(gone.rank, gone)
                self.add_ending(ending)
                return quoted(ending)
            if not _is_of_connections(error) or time.monotonic() > deadline:
                return None
            time.sleep(0.05)

    def gone_neighbour(self) -> Beat | None:
        """A rank of this host whose process is gone though it was not done."""
        for rank, process in self.neighbours().items():
            if process.state() == "gone":
                beat = read_beat(self.folder, rank)  # only now: it may have ended well
                if beat is not None and beat.phase != ENDED:
                    return beat
        return None

    def neighbours(self) -> dict[int, ProcessId]:
        """The processes of the other ranks of this host, as far as they have begun to write."""
        # launchers number the ranks of a host one after the other
        first = self.world.rank - self.world.local_rank
        for rank in range(max(first, 0), min(first + self.world.local_size, self.world.size)):
            if rank != self.world.rank and rank not in self._neighbours:
                beat = read_beat(self.folder, rank)
                if beat is not None:
                    self._neighbours[rank] = beat.process
        return dict(self._neighbours)

    def close(self) -> None:
        """See `Heartbeat.close`. After a failure the file stays as it is: it says what the rank was doing."""
        if self._closing.is_set():
            return
        if not self.has_failed:
            self.at(ENDED)
        self._closing.set()
        if self._writer.is_alive():
            self._writer.join(_CLOSING_SECONDS)

    def now(self) -> Beat:
        """What would be written now."""
        work = self.work
        shown, num_examples = _first_ids(work.batches)
        return Beat(
            self.world.rank, self.process, self._beats, work.progress, work.step, work.phase, shown, num_examples,
            work.grace_seconds, self.interval_seconds, *self.stands_at,
        )  # fmt: skip

    def _keep_writing(self) -> None:
        while not self._closing.is_set():
            self._write()
            self._closing.wait(self.interval_seconds)
        self._write()

    def _write(self) -> None:
        self._beats += 1
        try:
            write_beat(self.folder, self.now())
        except OSError as error:
            # training goes on; the others would be told that this rank is silent only if they stood still
            if self._beats == 1:
                _log.warning("%s cannot be written (%s): a hang will be told without this rank", self.folder, error)


def interval_seconds(world_size: int) -> float:
    """Seconds between the beats of a rank: one, and more where thousands of ranks share a file system."""
    return min(max(1.0, world_size / _RANKS_PER_SECOND), _MAX_INTERVAL_SECONDS)


def quoted(first: Ending) -> MellowError:
    """The error of a rank that ends because another one ended first."""
    what = "was stopped" if first.kind == "stop" else f"failed first: {first.message}"
    error = FaultError(f"ended because rank {first.rank} {what}")
    error.exit_code = first.exit_code
    return error


def one_line(error: BaseException) -> str:
    """What an error says, on one line, with its kind where it is none of ours."""
    message = str(error) if isinstance(error, MellowError) else f"{type(error).__name__}: {error}"
    return " ".join(message.split())


def ending_of_gone(rank: int, beat: Beat | None) -> Ending:
    """What is said of a rank whose process has gone without a word; `beat`: what it wrote last, if that can be read."""
    which, where = (f" ({beat.process})", f", last seen in {describe_work(beat)}") if beat else ("", "")
    what = f"the process{which} was killed{where}"
    return Ending(rank, f"{what}; most often that is for memory: see the kernel's log on that host")


def ending_of_lost(rank: int, beat: Beat | None) -> Ending:
    """What is said of a rank whose host does not answer."""
    where = f"host {beat.process.host}" if beat else "its host"
    return Ending(rank, f"{where} does not answer: it is off, or its link is cut", kind="lost")


def describe_work(beat: Beat) -> str:
    """Phase, step and examples of a rank in a few words."""
    words = beat.phase + (f" of step {beat.step}" if beat.step else "")
    if beat.num_examples:
        shown = ", ".join(beat.examples[:4])
        words += f" (examples {shown}" + (f" and {beat.num_examples - 4} more)" if beat.num_examples > 4 else ")")
    return words


def make_heartbeats(folder: Path) -> None:
    """Rank 0, before the others open theirs: an empty folder, without what an earlier run left."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("rank-*.json", "rank-*.stacks.txt"):
        for old in folder.glob(pattern):
            old.unlink(missing_ok=True)
    make_endings(folder)


def beat_path(folder: Path, rank: int) -> Path:
    """The heartbeat file of a rank."""
    return folder / f"rank-{rank:05d}.json"


def stacks_path(folder: Path, rank: int) -> Path:
    """The file with a rank's stack traces."""
    return folder / stacks_name(rank)


def write_beat(folder: Path, beat: Beat) -> None:
    """Write over the rank's file; raises `OSError`."""
    record = {**beat._asdict(), "process": vars(beat.process), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    block = json.dumps(record, indent=1).encode()
    if len(block) >= _BLOCK_BYTES:  # names and paths of unusual length
        block = json.dumps({**record, "examples": [], "where": beat.where[-200:]}).encode()
    block = block.ljust(_BLOCK_BYTES - 1) + b"\n"
    # opened each time: what a file server's other clients see is what was written before a close
    handle = os.open(beat_path(folder, beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, block, 0)
    finally:
        os.close(handle)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """What a rank wrote last; None where it has not written, or is writing just now."""
    try:
        record = json.loads(beat_path(folder, rank).read_bytes())
        record.pop("time")
        record["examples"] = tuple(record["examples"])
        return Beat(**{**record, "process": ProcessId(**record["process"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _first_ids(batches: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], int]:
    """(as many ids as a record holds, number of all)."""
    ids = [example for batch in batches for example in batch]
    shown: list[str] = []
    left = _MAX_ID_CHARACTERS
    for example in ids:
        left -= len(example) + 8
        if left < 0:
            break
        shown.append(example)
    return tuple(shown), len(ids)


_CONNECTION_WORDS = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer", "process group")


def _is_of_connections(error: BaseException) -> bool:
    """Whether an error looks like one of talking to other ranks."""
    name = type(error).__name__
    return name.startswith("Dist") or any(word in str(error).lower() for word in _CONNECTION_WORDS)
