"""Feature shards by their commands: made of a run's encoder, trained on, evaluated on, refused where they misfit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mellow_ds.cli.train import main as train_main
from mellow_ds.monitor.metrics import read_metrics
from shards.cli import main as shards_main
from tests.cli.runs import ROOT, TINY, environment

WHOLE = [
    *TINY,
    "--data.segment_seconds",
    "4",
    "--train.max_steps",
    "2",
    "--train.warmup_steps",
    "1",
]  # no clip is cropped


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    """train.py as a process of its own: DeepSpeed starts once in one."""
    command = [sys.executable, "train.py", "--config", "quickstart", *map(str, arguments), *WHOLE]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment(), check=False
    )


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]


@pytest.fixture(scope="module")
def checkpoint(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step folder with an encoder that was trained for two steps."""
    run = tmp_path_factory.mktemp("trained")
    done = train("--data.shards", shards / "train", "--save-dir", run)
    assert done.returncode == 0, done.stderr[-3000:]
    return run / "checkpoints" / "step-000002"


@pytest.fixture(scope="module")
def features(checkpoint: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the held-out sounds."""
    out = tmp_path_factory.mktemp("features") / "test"
    arguments = ["--shards", shards / "test", "--checkpoint", checkpoint, "--out", out, "--workers", 1]
    command = [sys.executable, "-m", "shards", "features", *map(str, arguments)]  # a process: it sets up logging
    subprocess.run(command, capture_output=True, timeout=300, cwd=ROOT, env=environment(), check=True)
    return out


def frozen(checkpoint: Path) -> list[str]:
    return [
        "--resume_checkpoint", str(checkpoint), "--model.encoder.freeze_audio_encoder_weights", "true",
        "--model.encoder.use_pretrained_audioencoder", "true",
        "--model.encoder.pretrained_audioencoder_path", str(checkpoint),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_on_features_is_the_run_on_audio(checkpoint: Path, features: Path, shards: Path, tmp_path: Path) -> None:
    """The frozen encoder stands in eval mode in both; what is trained after it sees the same but for float16."""
    for name, folder in (("audio", shards / "test"), ("features", features)):
        done = train("--data.shards", folder, "--save-dir", tmp_path / name, *frozen(checkpoint))
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "features") == pytest.approx(losses(tmp_path / "audio"), abs=1e-3)
    kinds = [key for key in read_metrics(tmp_path / "features" / "metrics.jsonl")[0] if key.startswith("loss/subtype/")]
    assert kinds


@pytest.mark.slow
def test_evaluation_on_features_gives_the_scores_of_audio(
    checkpoint: Path, features: Path, shards: Path, tmp_path: Path
) -> None:
    answers = []
    for name, folder in (("audio", shards / "test"), ("features", features)):
        arguments = ["--mode", "evaluate_checkpoint", "--checkpoint_path", checkpoint, "--data.eval_shards", folder]
        done = train(*arguments, "--save-dir", tmp_path / name, "--evaluation.compare_silence", "false")
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / name / "evaluation" / checkpoint.name / "predictions.jsonl").read_text().splitlines()
        answers.append({json.loads(line)["id"]: json.loads(line)["prediction"] for line in lines})
    same = [answers[0][name] == answers[1][name] for name in answers[0]]
    assert sum(same) >= 0.95 * len(same)  # an untrained model may waver between two words


@pytest.mark.slow
def test_features_of_another_encoder_are_refused_by_name(features: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    for name in ("files.json", "state.json"):  # a model folder, not a step: one weight of its encoder is another
        (other / name).unlink()
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.startswith("encoder.") and name.endswith("running_mean"))
    weights[name].view(-1)[0] += 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    done = train("--data.shards", features, "--save-dir", tmp_path / "no", *frozen(other))
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: data.shards hold features of Cnn14 of {checkpoint.name} with the hash")
    assert "but this run's encoder, Cnn14, has" in line


def test_what_features_cannot_do_is_said_before_torch_is_needed(
    features: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(["--config", "quickstart", "--data.shards", str(features)]) == 2
    line = capsys.readouterr().err.strip()
    assert "features of a frozen encoder, but model.encoder.freeze_audio_encoder_weights would train it" in line
    phases = "[{from_step: 0, train: [projector]}, {from_step: 2, train: [projector, encoder]}]"
    assert train_main(["--config", "quickstart", "--data.shards", str(features), "--train.phases", phases]) == 2
    assert "features of a frozen encoder, but train.phases would train it" in capsys.readouterr().err
    arguments = [
        "--mode",
        "evaluate_checkpoint",
        "--checkpoint_path",
        str(checkpoint),
        "--data.eval_shards",
        str(features),
    ]
    assert train_main(["--config", "quickstart", *arguments, "--evaluation.compare_silence", "true"]) == 2
    assert "evaluation.compare_silence silences audio" in capsys.readouterr().err


def test_features_of_no_weights_or_of_features_are_refused(
    shards: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["features", "--shards", str(shards / "test"), "--out", str(tmp_path / "out")]
    assert shards_main([*arguments, "--config", "quickstart"]) == 2
    assert "features of an untrained one are noise" in capsys.readouterr().err
    assert shards_main([*arguments, "--checkpoint", str(checkpoint), "--data.shards", "x"]) == 2
    assert "is no option beside --checkpoint" in capsys.readouterr().err
    assert shards_main([*arguments, "--checkpoint", str(tmp_path)]) == 2
    assert "has no config.json: name a step folder" in capsys.readouterr().err
