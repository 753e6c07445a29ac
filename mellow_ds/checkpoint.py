"""Checkpoints of a run: a step is one folder, written aside and published by one rename, so that the newest is whole.

A step folder holds safetensors and JSON only, nothing that loading would execute. It is a model folder too: with the
configuration and tokenizer beside the weights, `MellowForConditionalGeneration.from_pretrained` reads it.

    model.safetensors        every weight and buffer once, float32, names as in the model: trained, frozen, statistics
    optimizer.safetensors    NAME::exp_avg and NAME::exp_avg_sq of the trained parameters
    random-00000.safetensors generator states of rank 0, and so on
    state.json               counters, schedule, data position
    config.json, tokenizer*  what `describe` adds: the model's configuration and its processor
    files.json               size and SHA-256 of each of the above, written last

Tensors are whole, whatever the engine's partitioning, so a step loads on any ZeRO stage and any number of ranks.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mellow_ds.engine.protocol import Engine, ParameterState
from mellow_ds.errors import CheckpointError
from mellow_ds.world import World

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
FILES_NAME = "files.json"
FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_MOMENT_SEPARATOR = "::"
_log = logging.getLogger("mellow_ds.checkpoint")


class CheckpointStore:
    """The step folders below `folder`. All ranks call the same methods; rank 0 writes what is shared."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World,
        agree: Callable[[bool], bool],
        describe: Callable[[Path], object] = lambda _: None,
    ) -> None:
        """`agree(ok)` tells all ranks whether all of them are well, and lets none go on before the others;
        `describe(folder)` writes the model's configuration and processor beside its weights (rank 0)."""
        self._folder = folder
        self._keep = keep
        self._world = world
        self._agree = agree
        self._describe = describe

    def steps(self) -> list[Path]:
        """Published step folders, oldest first."""
        found = [path for path in self._folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def folder_of(self, step: int) -> Path:
        """Where the step is published."""
        return self._folder / f"step-{step:06d}"

    def newest(self) -> Path | None:
        """The newest step folder whose files are all there and are what was written; None where there is none.

        A damaged one is passed over with a warning: the run goes on from the one before.
        """
        for path in reversed(self.steps()):
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                _log.warning("%s; trying the step before it", error)
            else:
                return path
        return None

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> Path:
        """Write and publish the step; older ones beyond `keep` are removed afterwards.

        Raises `CheckpointError` on all ranks where one of them cannot write; what was published before stays.
        """
        final = self.folder_of(step)
        aside = self._folder / f".writing-step-{step:06d}"
        failure: OSError | None = None
        if self._world.is_main:
            failure = _attempt(lambda: _fresh_folder(aside))
        self._together(failure, aside, final)
        # collective: every rank takes part in gathering, rank 0 keeps what is gathered
        tensors, moments = _gather(engine, self._world.is_main)
        failure = _attempt(lambda: self._write(aside, tensors, moments, state))
        self._together(failure, aside, final)
        if self._world.is_main:
            failure = _attempt(lambda: _publish(aside, final))
        self._together(failure, aside, final)
        if self._world.is_main:
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def _write(
        self, aside: Path, tensors: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], state: dict[str, Any]
    ) -> None:
        save_file(_generator_states(), aside / f"random-{self._world.rank:05d}.safetensors")
        if self._world.is_main:
            self._describe(aside)
            save_file(tensors, aside / MODEL_FILE, metadata={"format": "pt"})
            save_file(moments, aside / OPTIMIZER_FILE)
            content = {"format_version": FORMAT_VERSION, "world_size": self._world.size, **state}
            (aside / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _together(self, failure: OSError | None, aside: Path, final: Path) -> None:
        """Go on only where no rank failed; otherwise remove what was begun and raise everywhere."""
        if self._agree(failure is None):
            return
        if self._world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        kept = [path.name for path in self.steps()]
        left = f"{kept[-1]} stays loadable" if kept else "no step was saved before"
        raise CheckpointError(f"{final} was not saved: {_explain(failure, self._folder)}; {left}")


def load_checkpoint(folder: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Give the engine the optimizer state, scaler and random states of a step folder; returns its state.json.

    The weights are loaded into the model before an engine is built on it (`load_model_weights`); here the float32
    masters follow. On another world size every rank takes the generator state of a rank that there was.
    """
    state = read_state(folder)
    engine.load_parameter_states(_parameter_states(folder), int(state["num_updates"]))
    engine.load_scaler_state(state.get("scaler", {}))
    source_rank = world.rank % int(state["world_size"])
    _restore_generators(load_file(folder / f"random-{source_rank:05d}.safetensors"))
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The counters of a step folder."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read ({error}): take another step folder") from None
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format version {state.get('format_version')}; this reads {FORMAT_VERSION}")
    return state


def load_model_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load all weights and buffers of a step folder into `model`; names and shapes must be equal."""
    path = folder / MODEL_FILE
    wanted = model.state_dict(keep_vars=True)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(shapes, wanted, path)
            with torch.no_grad():
                for name in shapes:
                    wanted[name].copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): name a step folder such as RUN/checkpoints/step-000200"
        ) from None


def verify_checkpoint(folder: Path) -> None:
    """Raise `CheckpointError` naming the file that is missing, of another size, or whose SHA-256 differs."""
    try:
        files = json.loads((folder / FILES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{folder} has no readable {FILES_NAME}: it is not a whole checkpoint") from None
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; {expected['bytes']} were written")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not what was written")


def _check_shapes(found: dict[str, tuple[int, ...]], wanted: dict[str, torch.Tensor], path: Path) -> None:
    # a tied weight is in the file once, under its first name
    pointers: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        pointers.setdefault(tensor.data_ptr() or id(tensor), []).append(name)
    missing = [names[0] for names in pointers.values() if not any(name in found for name in names)]
    for name, shape in found.items():
        if name not in wanted:
            raise CheckpointError(f"{path} is of another model: it has {name}, which the configured model has not")
        if tuple(wanted[name].shape) != shape:
            raise CheckpointError(
                f"{path} is of another model shape: {name} is {list(shape)} there and {list(wanted[name].shape)} as "
                "configured; use the model configuration that it was trained with"
            )
    if missing:
        raise CheckpointError(f"{path} is of another model: it lacks {missing[0]} ({len(missing)} names in all)")


def _gather(engine: Engine, keep: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights and buffers, moments) whole; empty where `keep` is false."""
    tensors: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    fixed = engine.fixed_state()
    for state in engine.parameter_states():
        if keep:
            tensors[state.name] = state.weight
            moments.update({state.name + _MOMENT_SEPARATOR + key: moment for key, moment in state.moments.items()})
    return ({**tensors, **fixed}, moments) if keep else ({}, {})


def _parameter_states(folder: Path) -> Iterator[ParameterState]:
    with safe_open(folder / MODEL_FILE, framework="pt") as model, safe_open(folder / OPTIMIZER_FILE, "pt") as optimizer:
        by_name: dict[str, list[str]] = {}
        for key in optimizer.keys():  # noqa: SIM118
            by_name.setdefault(key.split(_MOMENT_SEPARATOR)[0], []).append(key)
        for name, keys in by_name.items():
            moments = {key.split(_MOMENT_SEPARATOR)[1]: optimizer.get_tensor(key) for key in keys}
            yield ParameterState(name, model.get_tensor(name), moments)


def _generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _publish(aside: Path, final: Path) -> None:
    """Flush all files, list them with their hashes, and rename the folder into place."""
    names = sorted(path.name for path in aside.iterdir())
    files = {name: {"bytes": (aside / name).stat().st_size, "sha256": _sha256(aside / name)} for name in names}
    (aside / FILES_NAME).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    for name in [*names, FILES_NAME]:
        _flush(aside / name)
    _flush(aside)
    if final.exists():
        # a resumed run passes a step that was saved before: whole, it stays, so that no moment is without it
        try:
            verify_checkpoint(final)
        except CheckpointError:
            shutil.rmtree(final)
        else:
            shutil.rmtree(aside)
            return
    aside.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_310(file)


def _sha256_310(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _attempt(action: Callable[[], None]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    except SafetensorError as error:
        # safetensors puts the operating system's error into its text: `No space left on device (os error 28)`
        code = re.search(r"os error (\d+)", str(error))
        return OSError(int(code.group(1)) if code else errno.EIO, str(error))
    return None


def _explain(failure: OSError | None, folder: Path) -> str:
    if failure is None:
        return "another rank could not write its part (see its message)"
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
        return f"the disk is full ({free / 1e6:.0f} MB free): make room or set save_dir to another disk"
    return f"{failure.strerror or failure}"
