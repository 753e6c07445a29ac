"""`mellow-ds export` on folders as runs leave them: what is written, what it computes, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mellow_ds.cli import export as export_command
from mellow_ds.cli.main import main
from mellow_ds.config.load import load_run_config
from mellow_ds.config.schema import DataConfig, DecoderConfig, EncoderConfig, LoraConfig, ModelConfig
from mellow_ds.model.assemble import build_layout, build_model, load_tokenizer
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.model.processing import build_processor
from mellow_ds.model.tokenizer import train_tokenizer
from tests.cli.runs import ROOT, TINY, environment, forked

DATA = DataConfig(sampling_rate=8000, segment_seconds=0.4, ip_text_len=16, op_text_len=12)
ENCODER = EncoderConfig(
    audioenc_name="Cnn14", channels=(4, 8), out_emb=8, d_proj=32, num_classes=5, mel_bins=16, window_size=256,
    hop_size=160, fmax=4000.0, audio_tokens=0, freeze_audio_encoder_weights=False,
)  # fmt: skip
QUESTION = "what is heard in the clip?"


def make_checkpoint(folder: Path, rank: int = 0) -> MellowForConditionalGeneration:
    """A folder such as a run on two ranks leaves: weights in two files, float32, with all that belongs to them."""
    decoder = DecoderConfig(
        text_decoder="from-config", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64,
        lora=LoraConfig(rank=rank, alpha=8.0),
    )  # fmt: skip
    config = ModelConfig(encoder=ENCODER, decoder=decoder)
    tokenizer = train_tokenizer([QUESTION, "a bell, then rain.", "a dog's bark (far away)"], 64)
    model = build_model(config, DATA, tokenizer, seed=2).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if "lora_B" in name or name.endswith("running_mean"):
                tensor.normal_(0, 0.3, generator=draw)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, max_shard_size="40KB")
    layout = build_layout(config, DATA, tokenizer, model.num_audio_tokens)
    build_processor(model, tokenizer, layout).save_pretrained(folder)
    return model


def sizes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of all tensors in a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    return found


def test_without_adapters_the_weights_are_those_of_the_checkpoint(tmp_path: Path, capsys) -> None:
    model = make_checkpoint(tmp_path / "step")
    assert len(list((tmp_path / "step").glob("model-*.safetensors"))) > 1
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 0
    assert "bit for bit, in float32" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = model.state_dict()
    assert expected.keys() - written.keys() == {"decoder.lm_head.weight"}  # tied: it is there once
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    opened = MellowForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert opened.decoder.lm_head.weight is opened.decoder.model.embed_tokens.weight
    assert opened.generation_config.max_new_tokens == 7


def test_adapters_are_merged_and_peft_is_not_needed_any_more(tmp_path: Path, capsys) -> None:
    """The folder opens and answers in a process of its own that cannot import peft."""
    pytest.importorskip("peft")
    model = make_checkpoint(tmp_path / "step", rank=3)
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 0
    assert "with its adapters, within" in capsys.readouterr().out
    names = sizes(tmp_path / "out")
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    clips = np.random.default_rng(0).normal(size=(2, 3200)).astype(np.float32) / 10
    np.save(tmp_path / "clips.npy", clips)
    code = """
import sys; sys.modules["peft"] = None
import numpy as np, torch
from mellow_ds import MellowForConditionalGeneration, MellowProcessor
model = MellowForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
processor = MellowProcessor.from_pretrained(sys.argv[1])
inputs = processor(["what is heard in the clip?"] * 2, [[clip] for clip in np.load(sys.argv[2])])
torch.save([model(**inputs).logits, model.generate(**inputs), dict(inputs)], sys.argv[3])
"""
    arguments = [tmp_path / "out", tmp_path / "clips.npy", tmp_path / "found.pt"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    logits, generated, inputs = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-4)
    assert torch.equal(generated, model.generate(**inputs))
    assert generated.shape[1] <= 7


def test_generate_reads_the_folder(tmp_path: Path, capsys) -> None:
    make_checkpoint(tmp_path / "step")
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(3200) / 5), 8000)
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    answers = []
    for folder in ("step", "out"):
        question = ["--audio", str(tmp_path / "a.wav"), "--prompt", QUESTION]
        assert main(["generate", "--checkpoint", str(tmp_path / folder), *question]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0].strip()


@pytest.mark.parametrize("rank", [0, 3])
def test_bfloat16_rounds_weights_but_not_statistics(tmp_path: Path, capsys, rank: int) -> None:
    model = make_checkpoint(tmp_path / "step", rank)
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(out), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert ("bit for bit, in bfloat16; from the logits of float32" in said) == (rank == 0)
    written = load_file(out / "model.safetensors")
    assert written["projector.linear1.weight"].dtype == torch.bfloat16
    assert written["encoder.net.bn0.running_mean"].dtype == torch.float32
    assert torch.equal(written["encoder.net.bn0.running_mean"], model.encoder.net.bn0.running_mean)
    assert torch.equal(written["projector.linear1.weight"], model.projector.linear1.weight.bfloat16())
    opened = MellowForConditionalGeneration.from_pretrained(out)
    assert opened.decoder.dtype == torch.bfloat16
    assert torch.equal(opened.encoder.net.bn0.running_mean, model.encoder.net.bn0.running_mean)


def test_a_large_model_goes_into_several_files(tmp_path: Path, monkeypatch) -> None:
    model = make_checkpoint(tmp_path / "step")
    monkeypatch.setattr("mellow_ds.model.export.write_weights.__defaults__", (30_000,))
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 40_000 for name in files)
    opened = MellowForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, opened[name]) for name, tensor in model.state_dict().items())


def flip(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    return "cannot be read"


def lose_a_weight(folder: Path) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop("projector.layer_norm.bias")
    tensors = load_file(file)
    del tensors["projector.layer_norm.bias"]
    save_file(tensors, file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "it lacks projector.layer_norm.bias"


@pytest.mark.parametrize("damage", [flip, lose_a_weight])
def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_is_left(tmp_path: Path, capsys, damage) -> None:
    make_checkpoint(tmp_path / "step")
    said = damage(tmp_path / "step")
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    (tmp_path / "step").mkdir()
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 2
    assert "not empty: choose a new folder" in capsys.readouterr().err
    assert main(["export", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "none is not there" in capsys.readouterr().err


def test_what_computes_something_else_is_not_handed_out(tmp_path: Path, capsys, monkeypatch) -> None:
    """Weights that are written wrongly: the proof finds it, and the folder does not get its name."""
    from mellow_ds.model import export

    make_checkpoint(tmp_path / "step")
    honest = export._tensor
    monkeypatch.setattr(
        export, "_tensor", lambda tensors, name, *rest: honest(tensors, name, *rest) * (1 + ("linear1" in name) * 1e-5)
    )
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 2
    assert "computes something else" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told(tmp_path: Path, capsys, monkeypatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_command, "_write_and_prove", full)
    (tmp_path / "step").mkdir()
    assert main(["export", "--checkpoint", str(tmp_path / "step"), "--out", str(tmp_path / "out")]) == 2
    assert "out was not written: the disk is full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.slow
def test_a_run_with_adapters_from_training_to_an_answer(shards: Path, tmp_path: Path) -> None:
    """Train, stop, go on, export and generate by the real commands."""
    pytest.importorskip("peft")
    lora = ["--model.decoder.lora.rank", "2", "--model.decoder.lora.dropout", "0.1"]
    run = ["--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path / "run", *TINY, *lora]
    for stop in ("3", "6"):
        (done,) = forked("train.py", *run, "--train.stop_at_step", stop)
        assert done.returncode == 0, done.stderr[-3000:]
    (refused,) = forked("train.py", *run, "--model.decoder.lora.alpha", "7")
    assert refused.returncode == 2
    assert "step-000006 is of a decoder with adapters of rank 2, alpha" in refused.stderr
    steps = [tmp_path / "run/checkpoints" / name for name in ("step-000003", "step-000006")]
    first, last = (
        {name: tensor for path in step.glob("model*.safetensors") for name, tensor in load_file(path).items()}
        for step in steps
    )
    changed = {name for name in first if name.startswith("decoder.") and not torch.equal(first[name], last[name])}
    assert changed
    assert changed == {name for name in first if ".lora_" in name}
    (done,) = forked("mellow-ds", "export", "--checkpoint", steps[1], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "with its adapters, within" in done.stdout
    clip = next((shards / "corpus").rglob("*.wav"))
    answers = [
        forked("mellow-ds", "generate", "--checkpoint", folder, "--audio", clip, "--prompt", QUESTION)[0]
        for folder in (steps[1], tmp_path / "out")
    ]
    assert [answer.returncode for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout


@pytest.mark.slow
def test_a_zero_1_run_with_a_frozen_part_is_exported_whole(shards: Path, tmp_path: Path) -> None:
    """Case 26, on two ranks: DeepSpeed's own converter loses what is frozen at this stage."""
    run = [
        "--config", "quickstart", "--data.shards", shards / "train", "--save-dir", tmp_path / "run", *TINY,
        "--engine", "deepspeed", "--deepspeed_config", "ds_configs/zero1.json", "--train.stop_at_step", "2",
        "--train.phases", "[{from_step: 0, train: [projector, decoder]}]",
    ]  # fmt: skip
    done = forked("train.py", *run, num_ranks=2)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr[-3000:]
    assert "DeepSpeed ZeRO-1" in done[0].stderr
    step, out = tmp_path / "run" / "checkpoints" / "step-000002", tmp_path / "out"
    (exported,) = forked("mellow-ds", "export", "--checkpoint", step, "--out", out)
    assert exported.returncode == 0, exported.stderr[-3000:]
    trained = {n.split("::")[0] for path in step.glob("optimizer*.safetensors") for n in load_file(path)}
    written = load_file(out / "model.safetensors")
    model = MellowForConditionalGeneration(MellowForConditionalGeneration.from_pretrained(out).config)
    assert model.state_dict().keys() - written.keys() == {"decoder.lm_head.weight"}  # tied
    assert not written.keys() - model.state_dict().keys()
    frozen = {name: tensor for name, tensor in written.items() if name.startswith("encoder.")}
    assert frozen
    assert not frozen.keys() & trained
    assert written.keys() == trained | frozen.keys()
    saved = {n: t for path in step.glob("model*.safetensors") for n, t in load_file(path).items()}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in written.items())
    # and it is what the run began with: nothing else has its seed's values
    begun = load_run_config(str(tmp_path / "run" / "config.yaml"))
    tokenizer = load_tokenizer(begun.model, begun.data, saved=tmp_path / "run" / "tokenizer")
    fresh = build_model(begun.model, begun.data, tokenizer, begun.train.seed).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in frozen.items())


def test_help_needs_no_torch() -> None:
    code = "import sys; from mellow_ds.cli.export import parse_arguments as p\n"
    code += "p(['--checkpoint', 'a', '--out', 'b'], 'x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
