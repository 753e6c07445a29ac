"""How much memory a rank takes while a decoder of 380 MB is brought in: its share and a block, never the whole."""

import ctypes
import gc
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mellow_ds.model.meta import DecoderWeights, parameters_on_meta
from mellow_ds.verify.small import small_model
from mellow_ds.world import World
from tests.engine.cases import ENGINES, shape, with_train
from tests.ranks import run_ranks

NUM_RANKS = 8
CONFIG = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
                     num_key_value_heads=8, vocab_size=12_000, tie_word_embeddings=True)  # fmt: skip
_M_MMAP_THRESHOLD = -3  # of malloc.h
BLOCK = 28.3  # MB of float32 a layer


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


def build(world: World, kind: str, folder: Path) -> float:
    json = {"zero_optimization": {"stage": 3}}
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system, and is not counted
    first = ENGINES[kind](small_model(seed=1), json, shape(world, 1), with_train(), torch.device("cpu"))
    first.close()  # what a first engine brings in
    model = small_model(seed=1)
    with parameters_on_meta():
        model.decoder = AutoModelForCausalLM.from_config(CONFIG)
    model.set_trainable(("projector", "decoder"))
    read = DecoderWeights(model.decoder, str(folder)).read
    with Peak() as peak:
        engine = ENGINES[kind](model, json, shape(world, 1), with_train(), torch.device("cpu"), read)
    assert engine.name
    return peak.growth


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
    growths = run_ranks(NUM_RANKS, build, kind, tmp_path)
    print(f"{kind}: {megabytes:.0f} MB in all, growth by rank {[round(growth) for growth in growths]} MB")
    share = megabytes / NUM_RANKS
    # a block is there as it was read, as it is cut, and once more where a collective hands it on
    assert max(growths) < copies * share + 3 * BLOCK + 25
    assert max(growths) < 0.75 * megabytes
