"""Run shard plans in processes: what a worker does with one, and how many threads torch may have meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mellow_ds.packing.shard_plan import PlanFile, read_plan
from mellow_ds.packing.shard_pool import each_shard
from mellow_ds.packing.write import ShardNote, write_shard

_HEAVY = ("torchaudio", "webdataset")  # imported once for all workers: it takes seconds


@dataclass(frozen=True)
class _Task:
    """One shard for a worker: where its plan and its questions are, so that a thousand tasks weigh nothing."""

    plans: Path
    plan_span: tuple[int, int]
    questions: Path
    versions: str  # of the libraries at work
    audio_root: Path
    folder: Path


def write_shards(
    plans: PlanFile,
    missing: Sequence[int],
    questions: Path,
    versions: str,
    audio_root: Path,
    folder: Path,
    workers: int,
    bar: Any,
) -> list[ShardNote]:
    """Write the shards `missing` (numbers) into `folder`; notes in their order, `bar.update` for each clip.

    `questions`: the file that their questions stand in. One worker, or one shard, needs no process of its own. Raises
    `OSError` where writing fails, `FaultError` where a worker was killed.
    """
    tasks = [_Task(plans.path, plans.span(number), questions, versions, audio_root, folder) for number in missing]
    return each_shard(write_task, tasks, workers, bar, preload=_HEAVY)


def write_task(task: _Task, count: Callable[[], None]) -> ShardNote:
    """Write one shard; `count` is called after each clip."""
    with _one_torch_thread():
        plan = read_plan(task.plans, task.plan_span)
        return write_shard(plan, task.versions, task.questions, task.audio_root, task.folder, count)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The bytes of a resampled clip may depend on the number of threads; the caller's setting is put back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
