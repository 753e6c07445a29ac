"""Which published steps stay: the newest, and the best by a metric."""

import logging
import math
import shutil
from collections.abc import Collection
from pathlib import Path

from mellow_ds.checkpoint.step_folder import read_state, step_of
from mellow_ds.errors import CheckpointError

_REMOVING = ".removing-"
_log = logging.getLogger("mellow_ds.checkpoint")


def published_steps(folder: Path) -> list[Path]:
    """The step folders in `folder`, oldest first."""
    numbered = [(step, path) for path in folder.glob("step-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(numbered)]


def best_step(steps: list[Path], metric: str) -> Path | None:
    """The step with the lowest `metric`, the newer of equal ones; steps that were saved without it do not count."""
    best, lowest = None, math.inf
    for path in steps:
        try:
            value = read_state(path).get("metrics", {}).get(metric)
        except CheckpointError:
            continue
        if value is not None and value <= lowest:
            best, lowest = path, value
    return best


def remove_old(folder: Path, step: int, keep: int, keep_best: str, damaged: Collection[int] = ()) -> None:
    """Remove the steps before `step` but the newest `keep` (it included) and the best by the metric `keep_best`.

    Later steps stay as they are: a run that went back to an older one has found them damaged, and they must not take
    the place of those that it saves now. Nor do those `damaged` when it has passed them: they go with older ones.
    """
    steps = [path for path in published_steps(folder) if (step_of(path) or 0) <= step]
    whole = [path for path in steps if step_of(path) not in damaged]
    best = best_step(whole, keep_best) if keep_best else None
    for path in steps[: steps.index(whole[-keep:][0])]:
        if path != best:
            remove_step(path)


def remove_step(path: Path) -> None:
    """Remove a step folder; killed half-way it leaves nothing that looks like a step."""
    aside = path.with_name(f"{_REMOVING}{path.name}")
    try:
        path.rename(aside)
    except OSError as error:
        _log.warning("%s cannot be removed (%s)", path, error.strerror)
        return
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Finish what `remove_step` was kept from finishing."""
    for old in folder.glob(f"{_REMOVING}*"):
        shutil.rmtree(old, ignore_errors=True)
