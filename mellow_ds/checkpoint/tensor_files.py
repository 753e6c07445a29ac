"""Named tensors in one safetensors file or split over several with an index, in the manner of transformers."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mellow_ds.checkpoint.step_folder import foreign_file
from mellow_ds.errors import CheckpointError

_PART = "@"  # before the place where a part begins


def file_name(stem: str, number: int, total: int) -> str:
    """`model.safetensors`, or `model-00001-of-00002.safetensors` for file 1 (from 1) of 2."""
    return f"{stem}.safetensors" if total == 1 else f"{stem}-{number:05d}-of-{total:05d}.safetensors"


def index_name(stem: str) -> str:
    """The file that says which tensor is where."""
    return f"{stem}.safetensors.index.json"


def index_text(files: Mapping[str, str], num_bytes: int) -> str:
    """The content of an index; `files`: name of tensor -> name of file."""
    return json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": dict(files)}, indent=1) + "\n"


def part_name(name: str, start: int) -> str:
    """What the numbers of a tensor from `start` on are stored as, flat; together the parts are the tensor."""
    return f"{name}{_PART}{start}"


def _name_and_start(stored: str) -> tuple[str, int | None]:
    """(the tensor's name, where this part of it begins; None: it is whole)."""
    name, mark, start = stored.rpartition(_PART)
    return (name, int(start)) if mark and start.isdecimal() else (stored, None)


class TensorFiles:
    """The tensors of one stem in a folder, opened for reading one at a time; a context manager.

    Tensors are views of the mapped files: what is not looked at is not read, and what is kept must be copied. One that
    lies there in parts is read as one flat tensor, under its own name.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        """Raises `CheckpointError` naming the file that is missing, damaged or no safetensors file."""
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._by_name: dict[str, Any] = {}
        index = folder / index_name(stem)
        expected = _read_index(index) if index.is_file() else None
        names = sorted(set(expected.values())) if expected is not None else [file_name(stem, 1, 1)]
        self.path = index if expected is not None else folder / names[0]  # for messages
        with contextlib.ExitStack() as stack:
            for name in names:
                file = stack.enter_context(_opened(folder / name))
                self._by_name.update(dict.fromkeys(file.keys(), file))
            if expected is not None and self._by_name.keys() != expected.keys():
                odd = sorted(self._by_name.keys() ^ expected.keys())[0]
                raise CheckpointError(f"{index} and the files that it names differ in {odd}: the step is damaged")
            self._stack = stack.pop_all()
        # by the name that a tensor is called by, the one that it has in a file, or those of its parts in their order
        self._stored: dict[str, tuple[str, ...]] = {}
        for name in sorted(self._by_name, key=_name_and_start):
            called = _name_and_start(name)[0]
            self._stored[called] = (*self._stored.get(called, ()), name)
        self._check_parts()

    def rename(self, new_names: Mapping[str, str]) -> None:
        """Call tensors by new names from now on; `new_names` by present name, others keep theirs."""
        self._stored = {new_names.get(name, name): stored for name, stored in self._stored.items()}

    def names(self) -> list[str]:
        """All names, in no particular order."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        parts = [tuple(self._by_name[part].get_slice(part).get_shape()) for part in self._stored[name]]
        return parts[0] if len(parts) == 1 else (sum(length for (length,) in parts),)

    def read(self, name: str) -> torch.Tensor:
        """A tensor, whole."""
        parts = [self._by_name[part].get_tensor(part) for part in self._stored[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_parts(self) -> None:
        """Raise `CheckpointError` where a part of a tensor is missing before another."""
        for name, parts in self._stored.items():
            expected = 0
            for part in parts:
                start = _name_and_start(part)[1]
                if start is None:
                    continue
                if start != expected:
                    self._stack.close()
                    raise CheckpointError(f"{self.path}: {name} lacks its part from {expected} on: the step is damaged")
                expected += self._by_name[part].get_slice(part).get_shape()[0]

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        foreign = "" if path.is_file() else foreign_file(path.parent)
        if foreign:
            raise CheckpointError(
                f"{path.parent / foreign} is a pickle, which may run code when it is read, so it is not; "
                f"{path.name} is missing: name a step folder such as RUN/checkpoints/step-000200"
            ) from None
        raise CheckpointError(
            f"{path} cannot be read ({error}): name a step folder such as RUN/checkpoints/step-000200"
        ) from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): take another step folder") from None
    for file in names.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names the file '{file}': only safetensors files beside it are read")
    return names
