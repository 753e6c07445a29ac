"""A model written for others: safetensors as transformers lays them out, adapters merged, in a chosen number format.

Tensors are read and written one file at a time, so a model takes the memory of one file, whatever its size. What is
written is then opened, and its logits on a probe batch are compared with those of the original.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from mellow_ds.data.batch import Batch
from mellow_ds.model.configuration import MellowConfig
from mellow_ds.model.lora import adapters_of, is_adapter, merged, plain_name, weights_with_adapters
from mellow_ds.model.meta import parameters_on_meta
from mellow_ds.model.modeling import MellowForConditionalGeneration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FILE_BYTES = 2 * 10**9  # of a file, and so of memory
_PROBE_PROMPT_TOKENS = 12


class NamedTensors(Protocol):
    """The weights of a checkpoint."""

    def names(self) -> list[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, unread."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One of them."""
        ...


def skeleton(config: MellowConfig) -> MellowForConditionalGeneration:
    """The model that `config` describes, without weights: names, shapes, and what is tied to what."""
    with parameters_on_meta():
        decoder = AutoModelForCausalLM.from_config(config.text_config)
        return MellowForConditionalGeneration(config, decoder=decoder)


def write_weights(
    tensors: NamedTensors, config: MellowConfig, out: Path, dtype: str, file_bytes: int = _FILE_BYTES
) -> None:
    """Write the weights and the configuration of a model folder.

    `dtype`: float32 or bfloat16; what is float32 in a model of any format (BatchNorm statistics) stays float32. Raises
    what the system raises where it cannot write.
    """
    model = skeleton(config)
    # as a run in this format would have them
    formats = {name: tensor.dtype for name, tensor in nn.Module.to(model, DTYPES[dtype]).state_dict().items()}
    groups = list(_in_files(tensors, formats, file_bytes))
    places: dict[str, str] = {}
    num_bytes = 0
    for number, names in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        content = {plain_name(name): _tensor(tensors, name, model, config).to(formats[name]) for name in names}
        content = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(content, out / file, metadata={"format": "pt"})  # transformers refuses files without this
        places.update(dict.fromkeys(content, file))
        num_bytes += sum(tensor.nbytes for tensor in content.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(places.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    _merged_config(config, dtype).save_pretrained(out)


@torch.no_grad()
def probe_logits(model: MellowForConditionalGeneration) -> torch.Tensor:
    """Logits [N, V] at all answer positions of a made batch: a row with one clip of noise and one with two."""
    draw = torch.Generator().manual_seed(0)
    batch = _probe_batch(model, draw)
    model.eval()
    return model(**batch.model_inputs()).logits.float()


def _probe_batch(model: MellowForConditionalGeneration, draw: torch.Generator) -> Batch:
    audio, samples = model.num_audio_tokens, model.config.encoder_config.clip_samples
    length = 2 * (audio + 1) + _PROBE_PROMPT_TOKENS
    ids = torch.randint(0, model.config.text_config.vocab_size, (2, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, audio + 1 + _PROBE_PROMPT_TOKENS :] = 0
    labels = torch.where(mask.bool(), ids, -100)
    row, start, clip = torch.tensor([[0, 0, 0], [1, 0, 1], [1, audio + 1, 0]]).unbind(dim=1)
    return Batch(torch.randn(2, samples, generator=draw) * 0.1, ids, mask, labels, row, start, clip)


def _in_files(tensors: NamedTensors, formats: dict[str, torch.dtype], file_bytes: int) -> Iterator[list[str]]:
    """Names as the checkpoint has them, in the model's order, in groups that fill a file."""
    there = set(tensors.names())
    group: list[str] = []
    used = 0
    for name, dtype in formats.items():
        if name not in there or is_adapter(name):
            continue  # a tied weight is there under its first name
        num_bytes = torch.Size(tensors.shape(name)).numel() * dtype.itemsize
        if group and used + num_bytes > file_bytes:
            yield group
            group, used = [], 0
        group.append(name)
        used += num_bytes
    yield group


def _tensor(
    tensors: NamedTensors, name: str, model: MellowForConditionalGeneration, config: MellowConfig
) -> torch.Tensor:
    """A tensor of the checkpoint, with its adapters in it."""
    adapted = weights_with_adapters(model)
    if name not in adapted:
        return tensors.read(name)
    down, up = (tensors.read(adapter) for adapter in adapters_of(name))
    return merged(tensors.read(name), down, up, config.lora or {}, adapted[name])


def _merged_config(config: MellowConfig, dtype: str) -> Any:
    own = copy.deepcopy(config)
    own.lora = None
    own.architectures = [MellowForConditionalGeneration.__name__]
    own.dtype = DTYPES[dtype]
    own.text_config.dtype = own.encoder_config.dtype = None  # the whole model's
    return own
