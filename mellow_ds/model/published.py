"""Weights that others published: reading their files safely, and their names turned into ours."""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from mellow_ds.errors import CheckpointError
from mellow_ds.model.configuration import CNN14, HTSAT

Tensors = Mapping[str, torch.Tensor]

_PRETRAINED_FILES = ("HTSAT_AudioSet_Saved_1.ckpt", "Cnn14_mAP=0.431.pth")
_HTSAT_PREFIX = "sed_model."  # of a Lightning file

# what such files hold beside weights: constants of the front end and of window attention, and a layer that is never run
_COMPUTED = re.compile(
    r"spectrogram_extractor\.|logmel_extractor\.|\.attn_mask$|\.relative_position_index$|(^|htsat\.)head\.(weight|bias)$"
    r"|\.rotary_emb\.inv_freq$|\.h\.\d+\.attn\.(masked_)?bias$"
)

# names in HTSAT's published code -> names in ClapAudioEncoder, the same network in transformers
_HTSAT_RENAMES = (
    (r"^tscam_conv\.", "tscam_conv."),
    (r"^bn0\.", "trunk.batch_norm."),
    (r"^(patch_embed|norm|layers)\.", r"trunk.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative_position_bias_table$", ".attention.self.relative_position_bias_table"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def load_pretrained_encoder(encoder: nn.Module, path: str | Path) -> None:
    """Load weights into `encoder` (HtsatEncoder or Cnn14Encoder): an AudioSet HTSAT checkpoint, a PANNs Cnn14 file, a
    folder with one of them, or a model folder of this project. Raises `CheckpointError`."""
    path = Path(path)
    own = _model_files(path)
    if own:
        prefix = "encoder."
        tensors: dict[str, torch.Tensor] = {}
        for part in own:
            with safe_open(part, framework="pt") as saved:
                tensors |= {n.removeprefix(prefix): saved.get_tensor(n) for n in saved.keys() if n.startswith(prefix)}  # noqa: SIM118
        load_exactly(encoder, tensors, path)
        return
    file = _encoder_file(path)
    tensors = read_checkpoint(file)
    if any(name.startswith(_HTSAT_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_HTSAT_PREFIX): tensor for name, tensor in tensors.items()}
    kind = HTSAT if any(name.startswith("patch_embed.") for name in tensors) else CNN14
    load_exactly(encoder, {f"net.{n}": t for n, t in rename_encoder(kind, drop_computed(tensors)).items()}, file)


def _model_files(folder: Path) -> list[Path]:
    """The weights of a model folder: one file, or those that its index names; none where it is something else."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [file] if (file := folder / "model.safetensors").is_file() else []
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is damaged: take another folder") from None
    files = [folder / Path(name).name for name in sorted(names)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing:
        raise CheckpointError(f"{missing} is missing: {index.name} names it")
    return files


def read_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a PyTorch file, plain or behind `state_dict` or `model`. Nothing in the file is executed."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not there: name a checkpoint file")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{file} holds objects other than tensors, and loading those would run code from the file ({reason}): "
            "save it again with its state_dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is not a PyTorch checkpoint, or is damaged: {type(error).__name__}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not named tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _encoder_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _PRETRAINED_FILES if (path / name).is_file()]
    found = found or sorted([*path.glob("*.ckpt"), *path.glob("*.pth"), *path.glob("*.pt")])
    if len(found) != 1:
        raise CheckpointError(f"{path} holds {len(found)} checkpoint files: name the file itself")
    return found[0]


def drop_computed(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not _COMPUTED.search(name)}


def rename_encoder(kind: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Names of the published network -> names inside our `net`."""
    if kind == CNN14:
        return dict(tensors)
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _HTSAT_RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." not in name:
            renamed[name] = tensor
            continue
        for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            renamed[name.replace(".attn.qkv.", f".attention.self.{part}.")] = third
    return renamed


def load_exactly(module: nn.Module, tensors: Tensors, source: Path) -> None:
    """Every parameter and buffer of `module` from `tensors`, and nothing left over."""
    own = module.state_dict()
    constant = {name for name in own if _COMPUTED.search(name)}
    unknown = sorted(tensors.keys() - own.keys())
    missing = sorted(own.keys() - tensors.keys() - constant)
    if unknown or missing:
        parts = [
            f"{len(names)} {what} ({_first(names)})"
            for names, what in ((unknown, "unknown"), (missing, "missing"))
            if names
        ]
        raise CheckpointError(f"{source}: the names do not fit the model: {' and '.join(parts)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensor.shape)}, but the model's is {list(own[name].shape)}"
            )
    module.load_state_dict(tensors, strict=False)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
