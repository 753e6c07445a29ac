"""Worker processes: a killed one ends the build with a clear line, and the caller's torch stays as it was."""

import contextlib
from typing import Any

import psutil
import pytest
import torch

from mellow_ds.errors import FaultError
from mellow_ds.packing.build import build_shards
from mellow_ds.packing.shard_plan import AudioForm, PlanFile, ShardPlan
from mellow_ds.packing.workers import write_shards


class KillingBar:
    """A progress bar that kills the workers at its first update."""

    n = 0

    def update(self, count: int = 1) -> None:
        del count
        for child in psutil.Process().children(recursive=True):
            # the forkserver's children are the workers; the forkserver and the resource tracker serve other tests too
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.parent() != psutil.Process():
                    child.kill()


@pytest.mark.slow
def test_a_killed_worker_is_said_to_be_killed(corpus: Any) -> None:
    plans, questions = PlanFile(corpus.folder / "plans"), corpus.folder / "questions"
    questions.touch()
    with plans.path.open("wb") as file:
        for number in range(500):
            plans.add(ShardPlan(f"shard-{number:06d}.tar", (), AudioForm(32_000, "flac")), file)
    with pytest.raises(FaultError, match=r"worker process was killed.*fewer --workers"):
        write_shards(plans, range(500), questions, "1.0", corpus.root, corpus.folder, 2, KillingBar())


def test_the_caller_keeps_its_torch_threads(corpus: Any) -> None:
    corpus.ask_tones(2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build_shards([corpus.write()], corpus.root, corpus.folder / "out", workers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
