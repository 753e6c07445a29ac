"""Decoders too large to be built whole: parameters on the meta device, and their weights from files one at a time."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mellow_ds.errors import ConfigError
from mellow_ds.model.decoder import FROM_CONFIG, is_gguf
from mellow_ds.model.lora import is_adapter, plain_name

ReadWeight = Callable[[str], torch.Tensor]  # by name in the whole model, of a tied weight the first
_KEY = "model.decoder.text_decoder"
_DECODER = "decoder."
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made while it lasts have their parameters on the meta device: no memory, no numbers drawn.

    Buffers are real, as they are what a module has computed for itself (rotary frequencies) and no file holds them.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def lies_in_safetensors(text_decoder: str) -> bool:
    """Whether `DecoderWeights` can read it: a folder or hub model with safetensors files."""
    if text_decoder == FROM_CONFIG or is_gguf(text_decoder):
        return False
    try:
        return bool(_files(_folder_of(text_decoder)))
    except ConfigError:
        return False


class DecoderWeights:
    """The pretrained weights of `decoder`, which may be on the meta device, read from its files one at a time.

    `text_decoder`: a folder or hub name with safetensors files. Raises `ConfigError` where they are not there or not
    those of this decoder. A tied weight is there once, adapters are not. Tensors are in the files' number format and
    views of the mapped file: take a part and convert it, and what is not looked at is never read.
    """

    def __init__(self, decoder: nn.Module, text_decoder: str) -> None:
        folder = _folder_of(text_decoder)
        wanted = _wanted(decoder)
        names = _names_in_files(wanted, str(getattr(decoder, "base_model_prefix", "")))
        self._places: dict[str, tuple[Path, str]] = {}  # name here -> (file, name there)
        for file in _files(folder):
            with _opened(file) as content:
                for stored in content.keys():  # noqa: SIM118
                    name = names.get(stored)
                    if name is not None and name not in self._places:
                        self._places[name] = (file, stored)
                        _check_shape(folder, stored, tuple(content.get_slice(stored).get_shape()), wanted[name])
        missing = [name for name in _unique(wanted) if name not in self._places]
        if missing:
            raise ConfigError(
                f"{_KEY}: the files in {folder} lack {plain_name(missing[0])} ({len(missing)} names in all): their "
                "names are not those of transformers' model; load and save it once with transformers, then name that "
                "folder"
            )

    def read(self, name: str) -> torch.Tensor:
        """The weight of this name in the whole model."""
        file, stored = self._places[name.removeprefix(_DECODER)]
        # opened anew for each: a mapped file that stays open keeps what was read of it in memory
        with _opened(file) as content:
            return content.get_tensor(stored)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the whole model, tensor) of all, in the order of the files."""
        for name in self._places:
            yield _DECODER + name, self.read(name)


def has_meta(module: nn.Module) -> bool:
    """Whether a parameter of it is on the meta device."""
    return any(parameter.is_meta for parameter in module.parameters())


def materialise(model: nn.Module, module: nn.Module, read: ReadWeight, dtype: torch.dtype = torch.float32) -> None:
    """Read the parameters of `module` (the model, or one inside it) that are on the meta device, into CPU memory.

    They stay the objects that they are: a tied weight is tied afterwards.
    """
    inside = {id(parameter) for parameter in module.parameters() if parameter.is_meta}
    if not inside:
        return
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            weight = read(name).to(dtype, copy=True)
            torch.utils.swap_tensors(parameter, nn.Parameter(weight, requires_grad=parameter.requires_grad))


def _wanted(decoder: nn.Module) -> dict[str, torch.Tensor]:
    """The decoder's own weights and saved buffers by name; a tied weight is there under each of its names."""
    state = decoder.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not is_adapter(name)}


def _names_in_files(wanted: dict[str, torch.Tensor], prefix: str) -> dict[str, str]:
    """Names that a weight may have in a file -> its name here, of a tied weight the first.

    Files of a bare model lack the prefix of a causal language model's names, as GPT-2's on the hub do.
    """
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in wanted.items():
        here = first.setdefault(id(tensor), name)
        names[plain_name(name)] = here
        names.setdefault(plain_name(name).removeprefix(f"{prefix}."), here)
    return names


def _unique(wanted: dict[str, torch.Tensor]) -> Iterator[str]:
    """Names, of a tied weight the first only."""
    seen: set[int] = set()
    for name, tensor in wanted.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name


def _check_shape(folder: Path, name: str, found: tuple[int, ...], wanted: torch.Tensor) -> None:
    if found != tuple(wanted.shape):
        raise ConfigError(
            f"{_KEY}: {name} in {folder} is {list(found)}, but its config.json asks for {list(wanted.shape)}: "
            "the files do not belong together"
        )


def _folder_of(text_decoder: str) -> Path:
    if is_gguf(text_decoder):
        raise ConfigError(
            f"{_KEY}: the GGUF file {text_decoder} can only be read whole: name a folder with safetensors files"
        )
    if Path(text_decoder).is_dir():
        return Path(text_decoder)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text_decoder, allow_patterns=["*.safetensors", _INDEX]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{_KEY}: no weights could be loaded from '{text_decoder}' ({reason})") from error


def _files(folder: Path) -> list[Path]:
    if (folder / _ONE_FILE).is_file():
        return [folder / _ONE_FILE]
    try:
        named = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        raise ConfigError(
            f"{_KEY}: {folder} has no {_ONE_FILE} and no readable {_INDEX}, from which a large decoder is read: "
            "load and save it once with transformers"
        ) from None
    if any(Path(str(name)).name != name for name in named):
        raise ConfigError(f"{_KEY}: {folder / _INDEX} names files outside its folder")
    return [folder / str(name) for name in sorted(named)]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{_KEY}: {file} cannot be read ({error}): it is missing or damaged") from None
