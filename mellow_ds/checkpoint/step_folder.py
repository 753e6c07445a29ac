"""A step folder: one optimizer step on disk, in safetensors and JSON only, nothing that loading would execute.

It is a model folder too: with the configuration and tokenizer beside the weights,
`MellowForConditionalGeneration.from_pretrained` reads it.

    model-00001-of-00002.safetensors      every weight and buffer once, float32, names as in the model: trained, frozen,
                                          statistics; split over as many files as ranks wrote (one: model.safetensors)
    model.safetensors.index.json          which file a tensor is in, as transformers has it (not with one file)
    optimizer-00001-of-00002.safetensors  NAME::exp_avg@0, NAME::exp_avg_sq@0 and NAME::num_updates of the trained
                                          weights, with an index like the model's; a moment is flat, and where several
                                          ranks hold it in parts, the one with the numbers from 500 on is named @500
    random-00000.safetensors              generator states of rank 0, and so on
    state.json                            counters, schedule, data position, metrics
    config.json, tokenizer*               the model's configuration and its processor
    files.json                            size and SHA-256 of each of the above, written last

Weights are whole and moments can be put together, whatever the engine's partitioning, so a step loads on any engine and
any number of ranks. Older ones are read too: format version 2 had moments in the shape of their weight (NAME::exp_avg),
version 1 one file of weights, one of moments, and one count of updates for all of them.
"""

import json
import re
from pathlib import Path
from typing import Any

from mellow_ds.errors import CheckpointError

MODEL = "model"
OPTIMIZER = "optimizer"
STATE_FILE = "state.json"
FORMAT_VERSION = 3
_READ_VERSIONS = (1, 2, 3)
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # files whose loading may run code


def step_name(step: int) -> str:
    """The name of the folder of a step."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says; None for any other name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def random_file(rank: int) -> str:
    """The file with the generator states of a rank."""
    return f"random-{rank:05d}.safetensors"


def read_state(folder: Path) -> dict[str, Any]:
    """The counters of a step folder; raises `CheckpointError` where it has none that this version reads."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read ({error}): take another step folder") from None
    version = state.get("format_version") if isinstance(state, dict) else None
    if version not in _READ_VERSIONS:
        raise CheckpointError(f"{folder} has format version {version}; this reads {FORMAT_VERSION} and older ones")
    return dict(state)


def foreign_file(folder: Path) -> str:
    """The name of a file that may hold code instead of tensors (a pickle), such as other programs write; else ""."""
    found = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES) if folder.is_dir() else []
    return found[0] if found else ""
