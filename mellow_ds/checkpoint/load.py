"""Taking up a step: weights into a model, optimizer state into an engine, one tensor at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import CONFIG_NAME

from mellow_ds.checkpoint.random_states import branch_generators, restore_generators
from mellow_ds.checkpoint.snapshot import MOMENT_SEPARATOR, NUM_UPDATES
from mellow_ds.checkpoint.step_folder import MODEL, OPTIMIZER, random_file, read_state
from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.engine.protocol import Engine, ParameterState
from mellow_ds.errors import CheckpointError
from mellow_ds.model.lora import is_adapter, plain_name
from mellow_ds.world import World


def load_checkpoint(folder: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Give the engine the optimizer state, scaler and random states of a step folder; returns its state.json.

    The weights are loaded into the model before an engine is built on it (`load_model_weights`); here the float32
    masters follow. A rank that there was not takes a generator state that follows from that of one that there was, and
    is its own: with the same one both would draw the same dropout from then on.
    """
    state = read_state(folder)
    with TensorFiles(folder, MODEL) as weights, TensorFiles(folder, OPTIMIZER) as moments:
        engine.load_parameter_states(_parameter_states(weights, moments, int(state.get("num_updates", 0))))
    engine.load_scaler_state(state.get("scaler", {}))
    num_saved = int(state["world_size"])
    restore_generators(load_file(folder / random_file(world.rank % num_saved)))
    if world.rank >= num_saved:
        branch_generators(world.rank)
    return state


def open_weights(model: nn.Module, folder: Path) -> TensorFiles:
    """The weights of a step folder by their names in `model`, one tensor at a time.

    A model with adapters may start from a step without any: its own weights have other names then.
    """
    tensors = TensorFiles(folder, MODEL)
    names = [name for name, _ in model.named_parameters()]
    if any(map(is_adapter, names)) and not any(map(is_adapter, tensors.names())):
        tensors.rename({plain_name(name): name for name in names})
    return tensors


def load_model_weights(model: nn.Module, folder: Path) -> None:
    """Load all weights and buffers of a step folder into `model`; names and shapes must be equal.

    Adapters that the step has not stay as they were drawn; parameters on the meta device stay there.
    """
    wanted = model.state_dict(keep_vars=True)
    with open_weights(model, folder) as tensors, torch.no_grad():
        if not any(map(is_adapter, tensors.names())):
            wanted = {name: tensor for name, tensor in wanted.items() if not is_adapter(name)}
        check_shapes(tensors, wanted)
        for name in tensors.names():
            wanted[name].copy_(tensors.read(name))


def check_adapters(model: nn.Module, folder: Path, goes_on: bool) -> None:
    """Raise `CheckpointError` where the adapters of `folder` are others than those of `model`.

    Their names and shapes do not tell: alpha scales what they give. `goes_on`: the run is that of the folder, and so
    cannot begin to have some; a run that starts from the folder may.
    """
    wanted = _adapters(getattr(getattr(model, "config", None), "lora", None))
    try:
        saved = _adapters(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("lora"))
    except (OSError, ValueError):
        return  # what cannot be read is refused where it is needed
    if saved == wanted or (not saved and not goes_on):
        return
    cure = (
        f"leave model.decoder.lora as it was, or start anew from it in another save_dir (resume_checkpoint: {folder})"
        if not saved
        else "set model.decoder.lora as it was"
    )
    raise CheckpointError(
        f"{folder} is of a decoder with {saved or 'no adapters'}, but the run configures {wanted or 'none'}: {cure}"
    )


def _adapters(fields: dict[str, Any] | None) -> str:
    """What of a model's `lora` belongs to its function, in words; empty without adapters."""
    if not fields:
        return ""
    return f"adapters of rank {fields['rank']}, alpha {fields['alpha']:g}, on {', '.join(fields['target_modules'])}"


def check_shapes(tensors: TensorFiles, wanted: dict[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` where a step is of another model than one with the state dict `wanted`."""
    # a tied weight is in the files once, under its first name
    pointers: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        pointers.setdefault(tensor.data_ptr() or id(tensor), []).append(name)
    found = set(tensors.names())
    missing = [names[0] for names in pointers.values() if found.isdisjoint(names)]
    for name in sorted(found):
        if name not in wanted:
            raise CheckpointError(
                f"{tensors.path} is of another model: it has {name}, which the configured model has not"
            )
        if tuple(wanted[name].shape) != tensors.shape(name):
            raise CheckpointError(
                f"{tensors.path} is of another model shape: {name} is {list(tensors.shape(name))} there and "
                f"{list(wanted[name].shape)} as configured; use the model configuration that it was trained with"
            )
    if missing:
        raise CheckpointError(
            f"{tensors.path} is of another model: it lacks {missing[0]} ({len(missing)} names in all)"
        )


def _parameter_states(weights: TensorFiles, moments: TensorFiles, num_updates: int) -> Iterator[ParameterState]:
    """`num_updates`: of a parameter without a count of its own, as format version 1 had them."""
    by_name: dict[str, list[str]] = {}
    for key in moments.names():
        by_name.setdefault(key.split(MOMENT_SEPARATOR)[0], []).append(key)
    for name, keys in sorted(by_name.items()):
        found = {key.split(MOMENT_SEPARATOR)[1]: moments.read(key) for key in keys}
        own_updates = found.pop(NUM_UPDATES, None)
        weight = weights.read(name)
        for key, moment in found.items():
            if moment.numel() != weight.numel():
                raise CheckpointError(
                    f"{moments.path}: {name}{MOMENT_SEPARATOR}{key} has {moment.numel()} numbers, its weight "
                    f"{weight.numel()}: the step is damaged; take another"
                )
            found[key] = moment.view(weight.shape)
        yield ParameterState(name, weight, found, num_updates if own_updates is None else int(own_updates))
