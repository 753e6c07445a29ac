"""How a run is put together: keys of one word that change how the model runs reach it, and are off by default."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mellow_ds.cli import training
from mellow_ds.config.load import load_run_config
from mellow_ds.data.order import BatchPlan
from mellow_ds.data.reader import ShardReader
from mellow_ds.errors import FaultError
from mellow_ds.model.norm import BatchNorm2d
from mellow_ds.verify.small import batch_of, small_model
from mellow_ds.world import World
from tests.ranks import run_ranks


def build(world: World, **train: Any) -> tuple[Any, Any, list[Any]]:
    """(engine, model, what was handed to torch.compile), with the encoder trained."""
    config = load_run_config("quickstart", {"deepspeed_config": "ds_configs/zero1.json"})
    config = replace(config, train=replace(config.train, batch_size=4, global_batch_size=4 * world.size, **train))
    model = small_model(seed=1)
    model.set_trainable(("encoder", "projector", "decoder"))
    compiled: list[Any] = []
    training.compile_blocks = compiled.append  # type: ignore[assignment]
    plan = BatchPlan.from_config(config.train, world)
    return training._build_engine(config, model, plan, world, torch.device("cpu"), None), model, compiled


def passes_of_a_block(engine: Any, model: Any) -> int:
    """Times that a decoder block runs forward in a step."""
    runs: list[int] = []
    # before it: where it runs again, it runs no further than to the last value that is needed
    handle = model.decoder.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    engine.train_step([batch_of([1, 2], model.num_audio_tokens)], 1e-3, 0.5)
    handle.remove()
    return len(runs)


def shared_norms(model: Any) -> set[bool]:
    """Of the BatchNorm layers: whether their statistics are those of all ranks."""
    return {m.group is not None for m in model.modules() if isinstance(m, BatchNorm2d)}


def check(world: World) -> None:
    engine, model, compiled = build(world)
    assert passes_of_a_block(engine, model) == 1
    assert shared_norms(model) == {True}
    assert not compiled
    engine.close()
    engine, model, compiled = build(world, activation_checkpointing=True, compile=True, sync_batchnorm=False)
    assert passes_of_a_block(engine, model) == 2
    assert shared_norms(model) == {False}
    assert compiled == [model.decoder]
    engine.close()


def test_keys_of_one_word_reach_the_model() -> None:
    run_ranks(2, check)


def make_tokenizer(world: World, shards: Path, saved: Path) -> None:
    config = load_run_config("quickstart", {"data.shards": str(shards)})
    reader = ShardReader.from_config(config.data.train_shards, config.data)
    original = PreTrainedTokenizerBase.save_pretrained

    def half(self: Any, folder: Path, *_: Any, **__: Any) -> None:
        original(self, folder)
        (folder / "tokenizer.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    PreTrainedTokenizerBase.save_pretrained = half  # type: ignore[assignment]
    with pytest.raises(FaultError, match=r"tokenizer cannot be written: the disk is full"):
        training._shared_tokenizer(config, reader, saved, world)
    PreTrainedTokenizerBase.save_pretrained = original
    assert not saved.exists()
    made: Any = training._shared_tokenizer(config, reader, saved, world)
    # it is there: a start reads it, and writes nothing that could be cut off
    PreTrainedTokenizerBase.save_pretrained = half  # type: ignore[assignment]
    again: Any = training._shared_tokenizer(config, reader, saved, world)
    assert again.get_vocab() == made.get_vocab()
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_tokenizer_is_whole_or_not_there(shards: Path, tmp_path: Path) -> None:
    run_ranks(1, make_tokenizer, shards / "train", tmp_path / "run" / "tokenizer")
