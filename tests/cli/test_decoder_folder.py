"""A decoder in a folder of safetensors, read whole or a block at a time: the same run by the real command."""

from pathlib import Path

import pytest

from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import TINY, forked

pytestmark = pytest.mark.slow


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]


@pytest.fixture(scope="module")
def decoder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a tokenizer of the corpus, as people save one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from mellow_ds.data.corpus import iterate_texts
    from mellow_ds.data.reader import ShardReader
    from mellow_ds.model.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = train_tokenizer(iterate_texts(ShardReader([str(shards / "train")], sampling_rate=32_000)), 300)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=300, tie_word_embeddings=True)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_sharded_from_the_files_trains_and_resumes_as_whole(shards: Path, decoder: Path, tmp_path: Path) -> None:
    def train(run: str, *more: object) -> str:
        arguments = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path / run, *TINY]
        ranks = forked(
            "train.py", *arguments, "--model.decoder.text_decoder", decoder, *more, num_ranks=2
        )  # fmt: skip
        for rank in ranks:
            assert rank.returncode == 0, rank.stderr[-3000:]
        return ranks[0].stderr

    train("whole", "--deepspeed_config", "ds_configs/zero2.json")
    zero3 = ["--deepspeed_config", "ds_configs/zero3.json"]
    said = train("zero3", *zero3, "--train.stop_at_step", 4)
    assert "DeepSpeed ZeRO-3" in said
    train("zero3", *zero3)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    train("fsdp", *zero3, "--engine", "fsdp", "--train.stop_at_step", 2)
    train("fsdp", *zero3, "--engine", "fsdp")
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
