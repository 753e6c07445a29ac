"""What README and docs tell people to type: parsed by the real parsers, and the README's own road run in order."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mellow_ds.errors import ConfigError
from tests.cli.runs import TINY, forked
from tests.docs.commands import (
    DOCUMENTS,
    NOT_RUN,
    ROOT,
    check_mention,
    fenced,
    fenced_commands,
    help_examples,
    mentioned_commands,
    parse,
    shards_commands,
)

README = ROOT / "README.md"


def named(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_command_in_a_block_is_one_that_its_program_takes(document: Path) -> None:
    for command in fenced_commands(document):
        try:
            parse(command)
        except SystemExit as refused:
            pytest.fail(f"{command}: refused ({refused.code})")


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_command_named_in_the_text_is_there(document: Path) -> None:
    for command in mentioned_commands(document):
        try:
            check_mention(command)
        except SystemExit as refused:
            pytest.fail(f"{command}: refused ({refused.code})")


def test_the_extraction_finds_what_is_there() -> None:
    """Commands that are known to stand in the documents, of each kind that is looked for."""
    blocks = [command for document in DOCUMENTS for command in fenced_commands(document)]
    assert "bash launch/quickstart.sh" in blocks
    assert "mellow-shards build --json train.json --audio-root audio --out shards/train" in blocks  # indented
    assert any("--mode evaluate_checkpoint" in command and "--save-dir runs/mine" in command for command in blocks)
    assert any(command.startswith("python benchmarks/train_step.py") for command in blocks)  # without a language
    mentions = [command for document in DOCUMENTS for command in mentioned_commands(document)]
    assert "bash launch/ssh/single_node.sh --config mellow --data.shards SHARDS" in mentions  # in a table
    assert "mellow-ds convert --from-mellow v0.ckpt --out converted" in mentions


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --config mellow --data.shard a",
        "python train.py --config melow --data.shards a",
        "python train.py --config mellow --deepspeed_config ds_configs/zero9.json",
        "python trian.py --config mellow",
        "deepspeed --gpus 4 train.py --config mellow",
        "deepspeed --num_gpus 4 train.py --config mellow --train.batchsize 4",
        "torchrun --nproc 4 --what 3 train.py --config mellow",
        "srun --nodes=2 python train.py --confg mellow",
        "mellow-shards pack --json a.json",
        "mellow-shards build --json a.json --audio-root audio",
        "mellow-ds ask --checkpoint a",
        "mellow-ds generate --checkpoint a --sound b.wav",
        "mellow-ds convert --from-mellow a --out b --model.decoder.txt_decoder c",
        "python benchmarks/train_step.py --round 5 minutes",
        "bash launch/slowstart.sh",
        "make install",
    ],
)
def test_a_command_that_would_be_refused_is_found(command: str) -> None:
    with pytest.raises((SystemExit, ConfigError, AssertionError)):
        parse(command)


def test_what_is_not_run_here_is_documented() -> None:
    """No reason without a command that it is for."""
    commands = [c for document in DOCUMENTS for c in fenced_commands(document) + mentioned_commands(document)]
    assert [known for known in NOT_RUN if not any(c.startswith(known) for c in commands)] == []
    assert [c for c in commands if not any(c.startswith(known) for known in NOT_RUN)] == []


@pytest.mark.slow
def test_examples_in_help_texts_are_taken() -> None:
    examples = help_examples()
    assert len(examples) > 15
    for example in examples:
        try:
            parse(example)
        except SystemExit as refused:
            pytest.fail(f"{example}: refused ({refused.code})")


def test_the_table_of_folders_in_the_readme_is_true() -> None:
    table = README.read_text().split("## What is where")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", table, re.MULTILINE))
    for name in rows:
        assert (ROOT / name).exists(), name
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    folders = {name.split("/")[0] + "/" for name in tracked if "/" in name and not name.startswith(".")}
    assert folders <= rows.keys()
    # every command of mellow-shards, and none else
    said = re.match(r"`mellow-shards`: ([\w, ]+)", rows["shards/"])
    assert said is not None
    assert sorted(said.group(1).split(", ")) == sorted(shards_commands())
    # every page of docs/
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    assert set(re.findall(r"docs/([\w-]+\.md)", rows["docs/"])) == pages


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), target


@pytest.mark.slow
def test_training_on_own_data_as_the_readme_says(tmp_path: Path) -> None:
    """The section's blocks in order, in an empty folder; a tiny model is appended to what trains or evaluates."""
    section = README.read_text().split("## Train on your own data")[1].split("\n## ")[0]
    (tmp_path / "section.md").write_text(section)
    ((_, records),) = [block for block in fenced(tmp_path / "section.md") if block[0] == "json"]
    write_own_data(tmp_path, json.loads(records))
    small = [
        "--model.encoder.audioenc_name", "Cnn14", "--model.encoder.freeze_audio_encoder_weights", "false",
        "--model.encoder.use_pretrained_audioencoder", "false", "--model.decoder.text_decoder", "from-config", *TINY,
    ]  # fmt: skip
    ran = []
    for command in fenced_commands(tmp_path / "section.md"):
        words = shlex.split(command.replace("step-002000", "step-000006"))  # the last step of the tiny run
        words = words[1:] if words[0] == "python" else words
        # training as it is by default, with loader processes; what they cost is paid once
        workers = ["--train.num_workers", "1"] if "--mode" not in words else []
        (done,) = forked(*words, *([*small, *workers] if words[0] == "train.py" else []), folder=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        ran.append((" ".join(words[:2]), done))
    assert [name for name, _ in ran] == [
        "mellow-shards build", "mellow-shards build", "train.py --config", "train.py --config", "mellow-ds generate",
    ]  # fmt: skip
    assert ran[-1][1].stdout.count("\n") == 1
    assert (tmp_path / "runs/mine/evaluation/step-000006/results.json").is_file()
    # "goes on where it stopped when the same command is given again"
    train = next(c for c in fenced_commands(tmp_path / "section.md") if c.startswith("python train.py"))
    (again,) = forked(*shlex.split(train)[1:], *small, "--train.max_steps", 7, folder=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on from runs/mine/checkpoints/step-000006" in again.stderr


def write_own_data(folder: Path, records: list[dict[str, str]]) -> None:
    """train.json and test.json with the documented record and some of its kind, and their audio."""
    (folder / "audio").mkdir()
    (record,) = records
    more = [{**record, "filepath1": f"{name}.wav", "answer": f"a {name}"} for name in ("cat", "cow", "hen")]
    noise = np.random.default_rng(0)
    for one in [*records, *more]:
        soundfile.write(folder / "audio" / one["filepath1"], noise.normal(0, 0.1, 8_000), 16_000)
    (folder / "train.json").write_text(json.dumps([*records, *more]))
    (folder / "test.json").write_text(json.dumps([*more, *records]))
