"""The checkpoints of a run: saved beside training and published by one rename, so that the newest is always whole.

A save has three parts. `begin` gathers the state and copies it to CPU memory, every rank its share; training waits for
this alone. A thread of each rank writes and flushes. When all ranks have written, which they tell each other in the
all-reduce that ends each training step (`vote`, `settle`), rank 0's thread publishes; the ranks learn of that likewise.
No collective ever runs on a second thread.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from mellow_ds.checkpoint.background import BackgroundTask
from mellow_ds.checkpoint.failure import reason_of, room
from mellow_ds.checkpoint.files_list import damage_of
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.random_states import generator_states
from mellow_ds.checkpoint.retention import published_steps, remove_old
from mellow_ds.checkpoint.snapshot import take_snapshot
from mellow_ds.checkpoint.staging import Staging
from mellow_ds.checkpoint.step_folder import FORMAT_VERSION, STATE_FILE, random_file, step_name, step_of
from mellow_ds.checkpoint.write import aside_of, make_aside, publish, publish_written, write_part
from mellow_ds.engine.protocol import Engine
from mellow_ds.errors import CheckpointError

_log = logging.getLogger("mellow_ds.checkpoint")


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended; the same on all ranks but for the seconds."""

    step: int
    folder: Path
    num_bytes: int  # of the tensors of all ranks
    seconds_blocked: float  # that training waited for the copy
    seconds: float  # from the start until it was published or given up
    error: str = ""  # one line; empty where the step is published


@dataclass
class _Pending:
    """A save on its way."""

    step: int
    aside: Path
    final: Path
    started: float  # by the monotonic clock
    num_bytes: int = 0
    seconds_blocked: float = 0.0
    task: BackgroundTask | None = None  # what this rank does now; None where it only waits for the others
    is_publishing: bool = False  # all ranks have written
    error: Exception | None = None  # of this rank, before a task was begun


class CheckpointStore:
    """The step folders in `folder`, one that all ranks see. All ranks call the same methods in the same order."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        peers: Peers,
        describe: Callable[[Path], object] = lambda _: None,
        keep_best: str = "",
    ) -> None:
        """`describe(folder)` writes what makes a step a model folder, its configuration and processor; it is called
        once, on rank 0. `keep_best`: the name of a metric of `begin`; the step with the lowest is kept too."""
        self._folder = folder
        self._keep = keep
        self._keep_best = keep_best
        self._peers = peers
        self._world = peers.world
        self._describe = describe
        self._description: dict[str, bytes] | None = None
        self._pending: _Pending | None = None
        self._staging = Staging()
        self._damaged: frozenset[int] = frozenset()  # published steps that `newest` passed over

    def steps(self) -> list[Path]:
        """Published step folders, oldest first."""
        return published_steps(self._folder)

    def folder_of(self, step: int) -> Path:
        """Where the step is published."""
        return self._folder / step_name(step)

    def newest(self) -> Path | None:
        """The newest step folder whose files are all there and are what was written; None where there is no step.

        A damaged one is passed over with a warning: the run goes on from the one before. Raises `CheckpointError` with
        a list of them where all are damaged: to start from nothing then is for the user to say. The ranks share the
        reading.
        """
        own = []
        if self._world.is_main:
            for path in publish_written(self._folder):
                _log.info("%s was whole when the run ended; it is published now", path.name)
            own = [step for path in self.steps() if (step := step_of(path)) is not None]
        steps, damages = self._peers.from_main(own), []
        for step in reversed(steps):
            damage = damage_of(self.folder_of(step), self._peers)
            if not damage:
                self._damaged = frozenset(later for later in steps if later > step)
                return self.folder_of(step)
            damages.append(damage)
            if self._world.is_main and step != steps[0]:
                _log.warning("%s; trying the step before it", damage)
        if damages:
            raise CheckpointError(
                f"{self._folder} has no step that is whole: {'; '.join(damages)}; bring one back from a copy, or "
                "choose another save_dir to start from nothing"
            )
        return None

    def begin(self, step: int, engine: Engine, state: dict[str, Any]) -> SaveOutcome | None:
        """Copy the step and write it in the background; the outcome at once where not even a folder could be made.

        `state` (plain values) goes into state.json; `state["metrics"]` holds what `keep_best` looks at. The save before
        must have ended (`wait`).
        """
        assert self._pending is None, "the save before has not ended"
        pending = _Pending(step, aside_of(self._folder, step), self.folder_of(step), time.monotonic())
        self._pending = pending
        if self._world.is_main:
            try:
                make_aside(pending.aside)
                self._make_description(pending.aside)
            except Exception as error:  # a tokenizer that cannot be written raises one of many kinds
                pending.error = error
        if not self._peers.all_ok(pending.error is None):
            return self._failed(pending)
        snapshot = take_snapshot(engine, self._world.rank, self._world.size, self._staging)
        pending.num_bytes = snapshot.num_bytes
        contents = {random_file(self._world.rank): save(generator_states())}
        if self._world.is_main:
            content = {"format_version": FORMAT_VERSION, "world_size": self._world.size, **state}
            contents[STATE_FILE] = (json.dumps(content, indent=1) + "\n").encode()
            contents.update({name: text.encode() for name, text in snapshot.indices().items()})
            contents.update(self._description or {})
        tensors = snapshot.files()
        pending.task = BackgroundTask(lambda: write_part(pending.aside, self._world.rank, tensors, contents))
        pending.seconds_blocked = time.monotonic() - pending.started
        return None

    def vote(self) -> tuple[int, int]:
        """What this rank adds to the all-reduce of a step: (has ended its part of the save, has failed in it)."""
        pending = self._pending
        if pending is None:
            return 0, 0
        over = pending.task is None or pending.task.is_over
        return int(over), int(over and pending.task is not None and pending.task.error is not None)

    def settle(self, num_over: int, num_failed: int) -> SaveOutcome | None:
        """Take the sums of all votes; go on with the save where all are over. Returns its outcome when it has ended."""
        pending = self._pending
        if pending is None or num_over < self._world.size:
            return None
        if num_failed:
            pending.error = pending.task.error if pending.task else None
            return self._failed(pending)
        if pending.is_publishing:
            return self._ended(pending, "")
        pending.is_publishing = True
        pending.task = BackgroundTask(lambda: self._publish(pending)) if self._world.is_main else None
        return None

    def wait(self) -> SaveOutcome | None:
        """Wait for the save that is on its way, if there is one; its outcome."""
        while self._pending is not None:
            if self._pending.task is not None:
                self._pending.task.wait()
            _, failed = self.vote()
            num_failed = 0 if self._peers.all_ok(not failed) else 1
            outcome = self.settle(self._world.size, num_failed)
            if outcome is not None:
                return outcome
        return None

    def leave(self, seconds: float = 10.0) -> None:
        """Before a rank ends by a fault, alone maybe: let its part of a save get to the disk. Not a collective call.

        Where all ranks get this far, the step is published at the next start.
        """
        if self._pending is not None and self._pending.task is not None:
            self._pending.task.wait(seconds)

    def _publish(self, pending: _Pending) -> None:
        publish(pending.aside, pending.final, self._world.size)
        self._damaged -= {pending.step}
        remove_old(self._folder, pending.step, self._keep, self._keep_best, self._damaged)

    def _failed(self, pending: _Pending) -> SaveOutcome:
        """Remove what was begun, and say on all ranks what went wrong on one."""
        reasons = self._peers.texts("" if pending.error is None else reason_of(pending.error))
        if self._world.is_main:
            shutil.rmtree(pending.aside, ignore_errors=True)
        self._peers.all_ok(True)  # until it is removed: the room is counted after it
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        where = f"rank {rank}: {reason}" if self._world.size > 1 else reason
        kept = [path.name for path in self.steps()]
        left = f"{kept[-1]} stays loadable" if kept else "no step was saved before"
        return self._ended(
            pending, f"{pending.final} was not saved: {where}; {room(self._folder, pending.num_bytes)}; {left}"
        )

    def _ended(self, pending: _Pending, error: str) -> SaveOutcome:
        self._pending = None
        seconds = time.monotonic() - pending.started
        return SaveOutcome(pending.step, pending.final, pending.num_bytes, pending.seconds_blocked, seconds, error)

    def _make_description(self, aside: Path) -> None:
        """Keep the files of `describe`, made once and here: a tokenizer may not be used by two threads at a time."""
        if self._description is None:
            with tempfile.TemporaryDirectory(dir=aside) as name:  # no other disk is needed for a save than its own
                self._describe(Path(name))
                self._description = {path.name: path.read_bytes() for path in Path(name).iterdir()}
