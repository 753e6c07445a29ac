"""The memory of a rank with a decoder of 380 MB, from its files to a save: its share and blocks, not the whole."""

import ctypes
import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mellow_ds.checkpoint.snapshot import take_snapshot
from mellow_ds.model.meta import DecoderWeights, parameters_on_meta
from mellow_ds.model.projector import MellowProjector
from mellow_ds.verify.small import TRAIN, batch_of, small_model
from mellow_ds.world import World
from tests.engine.cases import ENGINES, EXAMPLES, shape, train, with_train
from tests.ranks import run_ranks

NUM_RANKS = 8
CONFIG = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                     num_key_value_heads=8, vocab_size=12_000, tie_word_embeddings=True)  # fmt: skip
_M_MMAP_THRESHOLD = -3  # of malloc.h
BLOCK, EMBEDDINGS = 28.3, 36.9  # MB of float32
REPO = Path(__file__).parents[2]


class Peak:
    """The most anonymous memory of this process (no mapped files) above that at the start, in MB, while it is open."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self._start = self.most = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = max(self.most, _anonymous()) - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, _anonymous())


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1000


def bring_in_and_use(world: World, kind: str, folder: Path) -> dict[str, float]:
    """What a rank takes above what it held before, in MB, by what it does."""
    engine_json = {"zero_optimization": {"stage": 3, **zero_options()}}
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system, and is not counted
    first = ENGINES[kind](small_model(seed=1), engine_json, shape(world, 1), with_train(), torch.device("cpu"))
    train(first, small_model(seed=1).num_audio_tokens, world, 1, EXAMPLES[:1])
    first.close()  # what a first engine brings in
    model = small_model(seed=1)
    with parameters_on_meta():
        model.decoder = AutoModelForCausalLM.from_config(CONFIG)
    model.projector = MellowProjector(model.config.encoder_config, CONFIG.hidden_size, 0.0)
    model.config.text_config = CONFIG
    model.set_trainable(("projector", "decoder"))
    read = DecoderWeights(model.decoder, str(folder)).read
    growths = {}
    with Peak() as peak:
        engine = ENGINES[kind](model, engine_json, shape(world, 1), with_train(), torch.device("cpu"), read)
    growths["build"] = peak.growth
    batch = batch_of([world.rank + 1], model.num_audio_tokens)
    with Peak() as peak:
        engine.train_step([batch], TRAIN.learning_rate, TRAIN.max_grad_norm)
    growths["step"] = peak.growth
    prompt = {name: value for name, value in batch.model_inputs().items() if name != "labels"}
    with Peak() as peak, engine.model_in_step() as in_step, torch.no_grad():
        in_step(**batch.model_inputs())
        in_step.generate(**prompt, max_new_tokens=1 + world.rank % 2, pad_token_id=0, synced_gpus=True)
    growths["evaluate"] = peak.growth
    with Peak() as peak:
        snapshot = take_snapshot(engine, world.rank, world.size)
    growths["copy of a save"] = peak.growth
    assert snapshot.tensors
    return growths


def zero_options() -> dict[str, Any]:
    """Those of the shipped file, for blocks of this size."""
    shipped = json.loads((REPO / "ds_configs/zero3.json").read_text(encoding="utf-8"))["zero_optimization"]
    block = int(BLOCK * 1e6 / 4)
    return {**shipped, "stage3_max_live_parameters": block, "reduce_bucket_size": block}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "copies"),
    [("fsdp", 1), ("deepspeed", 3)],  # ZeRO-3 makes its float32 masters and room for gradients at once
)
def test_no_rank_holds_more_than_its_share_and_a_block(tmp_path: Path, kind: str, copies: int) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(CONFIG)
    megabytes = 4 * sum(parameter.numel() for parameter in whole.parameters()) / 1e6
    whole.save_pretrained(tmp_path, max_shard_size="60MB")
    del whole
    growths = run_ranks(NUM_RANKS, bring_in_and_use, kind, tmp_path)
    most = {what: max(growth[what] for growth in growths) for what in growths[0]}
    print(f"{kind}: {megabytes:.0f} MB in all, {most}")
    share = megabytes / NUM_RANKS
    # a block is there as it was read, as it is cut, and once more where a collective hands it on
    few_blocks = 3 * BLOCK + 25
    assert most["build"] < copies * share + few_blocks
    assert most["step"] < 3 * share + EMBEDDINGS + few_blocks  # gradients and two moments
    assert most["evaluate"] < EMBEDDINGS + few_blocks
    assert most["copy of a save"] < 3 * share + few_blocks
    assert max(most.values()) < 0.8 * megabytes
