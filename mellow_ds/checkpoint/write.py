"""Writing a step aside and publishing it: each rank its files and their list, rank 0 the joined list and a rename."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from mellow_ds.checkpoint.files_list import (
    FILES_NAME,
    check_sizes,
    entry_of,
    flush,
    read_entries,
    verify_checkpoint,
    write_entries,
)
from mellow_ds.checkpoint.retention import remove_leftovers, remove_step
from mellow_ds.checkpoint.step_folder import read_state, step_name
from mellow_ds.errors import CheckpointError

_ASIDE = ".writing-"


def aside_of(folder: Path, step: int) -> Path:
    """Where a step is written before it is published in `folder`."""
    return folder / f"{_ASIDE}{step_name(step)}"


def make_aside(aside: Path) -> None:
    """A fresh folder to write into; what saves that were cut off have left beside it goes away."""
    for old in aside.parent.glob(f"{_ASIDE}*"):
        shutil.rmtree(old, ignore_errors=True)
    remove_leftovers(aside.parent)
    aside.mkdir(parents=True)


def write_part(
    aside: Path, rank: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], contents: Mapping[str, bytes]
) -> None:
    """Write a rank's files, flush them, and list them with their hashes; raises what the system raises."""
    for name, content in contents.items():
        (aside / name).write_bytes(content)
    for name, named in tensors.items():
        save_file(dict(named), aside / name, metadata={"format": "pt"})  # transformers refuses files without this
    for name in (*contents, *tensors):
        flush(aside / name)
    write_entries(_part_list(aside, rank), {name: entry_of(aside / name) for name in (*contents, *tensors)})
    flush(aside)


def publish(aside: Path, final: Path, num_ranks: int) -> None:
    """Join the lists of all ranks and rename the folder into place; rank 0 alone does this.

    Raises `CheckpointError` where a rank's files are not there as it listed them.
    """
    entries = {}
    for rank in range(num_ranks):
        entries.update(read_entries(_part_list(aside, rank)))
    check_sizes(aside, entries)
    write_entries(aside / FILES_NAME, entries)
    for rank in range(num_ranks):
        _part_list(aside, rank).unlink()
    flush(aside)
    if final.exists():
        # a resumed run passes a step that was saved before: whole, it stays, so that no moment is without it
        try:
            verify_checkpoint(final)
        except CheckpointError:
            remove_step(final)
        else:
            shutil.rmtree(aside)
            return
    aside.rename(final)
    flush(final.parent)


def publish_written(folder: Path) -> list[Path]:
    """Publish steps that all ranks had written when the run ended before it could; returns them.

    The last words of a save are said after the next step, so a run that dies in between leaves a whole step aside.
    """
    found = []
    for aside in sorted(folder.glob(f"{_ASIDE}step-*")):
        final = folder / aside.name.removeprefix(_ASIDE)
        with contextlib.suppress(CheckpointError, OSError):
            if final.exists():
                continue
            if (aside / FILES_NAME).is_file():
                verify_checkpoint(aside)
                aside.rename(final)
            else:
                publish(aside, final, int(read_state(aside)["world_size"]))
            found.append(final)
    return found


def _part_list(aside: Path, rank: int) -> Path:
    return aside / f"part-{rank:05d}.json"
