"""`mellow-ds doctor --hostfile` without ssh: this host alone, and what is refused. Several hosts: tests/cluster."""

import json
import socket
from pathlib import Path

import pytest

from mellow_ds.cli.main import main
from mellow_ds.preflight.survey import PROBE
from tests.ranks import free_port


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a hostfile that means this host."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:
    """Exit code, and what it says as JSON."""
    code = main(["doctor", "--hostfile", "hosts", "--json", *map(str, words)])
    return code, json.loads(capsys.readouterr().out)


def codes(said: dict) -> dict[str, str]:
    return {finding["code"]: finding["severity"] for finding in said["findings"]}


def test_this_host(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, "--master-port", free_port())
    assert code == 0, said["findings"]
    (host,) = said["hosts"]
    assert (host["problem"], host["missing"], host["unknown"]) == ("", [], {})
    assert host["shares"] == {str(here): True}
    assert list(here.iterdir()) == [here / "hosts"]  # what was written to see whether it is shared is gone


@pytest.mark.usefixtures("here")
def test_a_port_in_use_here(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        code, said = doctor(capsys, "--master-port", port)
    assert code == 2
    (found,) = [finding for finding in said["findings"] if finding["severity"] == "stops"]
    assert found["what"] == f"port {port} of localhost cannot be used: Address already in use"


def test_folders_of_a_run_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run folder is not there yet: its nearest parent is what has to be shared. Shards have a manifest."""
    (here / "shards").mkdir()
    (here / "shards" / "manifest.json").write_text("{}")
    run = ["--config", "quickstart", "--data.shards", "shards", "--save-dir", "runs/mine"]
    code, said = doctor(capsys, "--master-port", free_port(), *run)
    assert code == 0, said["findings"]
    assert said["hosts"][0]["shares"] == {str(here): True, str(here / "runs" / "mine"): True}
    assert not (here / "runs").exists()
    run[3] = "gone"
    code, said = doctor(capsys, "--master-port", free_port(), *run)
    assert code == 2
    assert [one["what"] for one in said["findings"] if one["severity"] == "stops"] == [
        f"localhost: {here / 'gone'} is not there, or has no manifest"
    ]


def test_a_stale_lock_and_a_full_name_for_the_caches(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = here / "cache" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(here / "cache"))
    _, said = doctor(capsys, "--master-port", free_port())
    assert "stale-lock" in codes(said)
    (found,) = [finding for finding in said["findings"] if finding["code"] == "stale-lock"]
    assert str(lock) in found["cure"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hostfile", "nothere"], "the hostfile nothere is not there"),
        (["--hostfile", "hosts", "--include", "node9"], "--include names host 'node9'"),
        (
            ["--hostfile", "hosts", "--train.batch_size", "8"],
            "'--train.batch_size' is not an option of mellow-ds doctor",
        ),
        (["--hostfile", "hosts", "--env-file", "nothere"], "--env-file nothere is not there"),
        (["--hostfile", "hosts", "--master-port", "0"], "--master-port is 0"),
        (["--hostfile=hosts", "--config", "quickstart", "--train.bach_size", "8"], "train.bach_size"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["doctor", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_python_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, "--python", here / "python")
    assert code == 2
    assert codes(said) == {"host-unreachable": "stops"}
    assert "its Python is not there" in said["findings"][0]["what"]


def test_the_probe_is_a_module() -> None:
    import importlib.util

    assert importlib.util.find_spec(PROBE) is not None
