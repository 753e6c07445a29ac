"""A save that is waited for, as most tests of checkpoints want it."""

from pathlib import Path
from typing import Any

from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.engine.protocol import Engine
from mellow_ds.errors import SaveError


def save_step(store: CheckpointStore, step: int, engine: Engine, state: dict[str, Any]) -> Path:
    """Write and publish the step; its folder. Raises `SaveError` on all ranks where one of them cannot."""
    outcome = store.begin(step, engine, state) or store.wait()
    assert outcome is not None
    if outcome.error:
        raise SaveError(outcome.error)
    return outcome.folder
