"""`mellow-ds launch` before anything is started: what a dry run shows, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mellow_ds.cli.launch import main
from mellow_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a hostfile and a script."""
    (tmp_path / "hosts").write_text("node1.invalid slots=4\nnode2.invalid slots=2\n")
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_shows_hosts_ranks_commands_and_variables(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "hidden-1")
    monkeypatch.setenv("MY_PASSWORD", "hidden-2")
    options = ["--hostfile", "hosts", "--include", "node2.invalid@node1.invalid:1,3", "--env", "MY_PASSWORD",
               "--interface", "ib0", "--dry-run"]  # fmt: skip
    assert main([*options, "--", "train.py", "--save-dir", "runs/a b"], "mellow-ds launch") == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].startswith(f"4 ranks on 2 hosts, in {here}; they meet at node1.invalid:29500")
    assert "host node1.invalid: ranks 0, 1, GPUs 1,3" in lines
    assert "host node2.invalid: ranks 2, 3" in lines
    assert sum(line.startswith("  ssh -T ") for line in lines) == 2
    assert f"  {sys.executable} train.py --save-dir 'runs/a b'" in lines
    assert {"  NCCL_DEBUG=INFO", "  MY_PASSWORD=(not shown)", "  GLOO_SOCKET_IFNAME=ib0"} <= set(lines)
    assert "not sent, secret by name: HF_TOKEN (send with --env HF_TOKEN)" in lines
    assert lines[-1] == "logs: runs/a b/logs/rank-N.log"
    assert "hidden" not in shown
    assert sorted(path.name for path in here.iterdir()) == ["hosts", "train.py"]


def test_neither_a_dry_run_nor_a_start_imports_torch(here: Path) -> None:
    code = (
        "import sys; from mellow_ds.cli.main import main; "
        "import mellow_ds.launcher.watch, mellow_ds.launcher.output, mellow_ds.launcher.agent; "
        "main(['launch', '--hostfile', 'hosts', '--dry-run', '--', 'train.py']); "
        f"train = [{str(ROOT / 'train.py')!r}, '--config', 'quickstart', '--data.shards', 'S']; "
        "main(['launch', '--dry-run', '--', *train]); "
        "sys.exit(1 if {'torch', 'numpy', 'transformers'} & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hostfile", "hosts"], "no command is given"),
        (["--hostfile", "hosts", "--"], "no command is given"),
        (["--hostfile", "nothere", "--", "train.py"], "the hostfile nothere is not there"),
        (["--include", "a", "--", "train.py"], "give --hostfile"),
        (["--num-per-host", "0", "--hostfile", "hosts", "--", "train.py"], "--num-per-host is 0"),
        (["--num-per-host", "-1", "--", "train.py"], "--num-per-host is -1"),
        (["--", "trian.py"], "the script trian.py is not there"),
        (["--env-file", "env.sh", "--", "train.py"], "--env-file env.sh is not there"),
        (["--ssh-config", "x", "--", "train.py"], "--ssh-config x is not there"),
        (["--master-port", "0", "--", "train.py"], "--master-port is 0"),
        (["--master-port", "70000", "--", "train.py"], "--master-port is 70000"),
        (["--master-addr", "-x;y", "--", "train.py"], "--master-addr: '-x;y' is not the name of a host"),
        (["--interface", "e0;reboot", "--", "train.py"], "--interface e0;reboot is not"),
        (["--stop-seconds", "-1", "--", "train.py"], "--stop-seconds is -1"),
        (["--env", "NOT_SET_HERE", "--", "train.py"], "--env NOT_SET_HERE: it is not set here"),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_cannot_be_meant_is_refused(arguments: list[str], message: str) -> None:
    if "--master-addr" in arguments:
        arguments = [f"--master-addr={arguments[1]}", *arguments[2:]]
    with pytest.raises(ConfigError) as refused:
        main(arguments, "mellow-ds launch")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_arguments_of_train_are_read_before_a_host_is_spoken_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    train = ["--dry-run", "--", "train.py", "--config", "quickstart", "--data.shards", "S"]
    assert main(train, "mellow-ds launch") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "logs: runs/quickstart/logs/rank-N.log"
    assert main([*train, "--save-dir", "elsewhere"], "mellow-ds launch") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "logs: elsewhere/logs/rank-N.log"
    with pytest.raises(ConfigError, match=r"batch_size"):
        main([*train, "--train.batchsize", "4"], "mellow-ds launch")


@pytest.mark.parametrize(
    ("options", "train", "message"),
    [
        ("--min-hosts 1", "", "--train.global_batch_size 24 (batch size 4 x 6 ranks x accumulation 1)"),
        ("--min-hosts 1 --num-per-host 1", "--train.gradient_accumulation_steps 2", "--train.global_batch_size 16 "
         "instead of train.gradient_accumulation_steps (batch size 4 x 2 ranks x accumulation 2)"),
        ("--min-hosts 1", "--train.global_batch_size 48 --train.resume never", "train.resume is never"),
        ("--min-hosts 3", "--train.global_batch_size 48", "--min-hosts is 3, but the run has 2 hosts"),
        ("--min-hosts -1", "--train.global_batch_size 48", "--min-hosts is -1, but"),
        ("--min-hosts 1 --max-restarts 0", "--train.global_batch_size 48", "--max-restarts is 0"),
    ],
)  # fmt: skip
def test_a_run_that_could_not_go_on_with_fewer_hosts_is_refused(
    here: Path, options: str, train: str, message: str
) -> None:
    script = [str(ROOT / "train.py"), "--config", "mellow", "--data.shards", "S", "--train.batch_size", "4",
              *train.split()]  # fmt: skip
    hosts = ["--hostfile", str(here / "hosts"), *options.replace(" -1", "=-1").split()]
    with pytest.raises(ConfigError) as refused:
        main([*hosts, "--dry-run", "--", *script], "mellow-ds launch")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_whose_batch_is_fixed_may_go_on_with_fewer_hosts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = [str(ROOT / "train.py"), "--config", "quickstart", "--data.shards", "S", "--train.global_batch_size", "48"]
    assert main(["--hostfile", str(here / "hosts"), "--min-hosts", "1", "--dry-run", "--", *script], "x") == 0
    assert "after a lost host: goes on with at least 1 host, 3 times at most" in capsys.readouterr().out
    (here / "hosts").write_text("node1.invalid slots=1\nlocalhost slots=1\n")
    with pytest.raises(ConfigError, match="any host may become the first, and localhost is none to others"):
        main(["--hostfile", str(here / "hosts"), "--min-hosts", "1", "--dry-run", "--", *script], "x")


@pytest.mark.usefixtures("here")
def test_runs_of_one_host_do_not_meet_at_the_same_port(capsys: pytest.CaptureFixture[str]) -> None:
    """Two that start together would find the usual one free, and take it seconds later."""
    assert main(["--num-per-host", "2", "--dry-run", "--", "train.py"], "x") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("; they meet at a free port of 127.0.0.1")
    assert main(["--num-per-host", "2", "--master-port", "29600", "--dry-run", "--", "train.py"], "x") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("; they meet at 127.0.0.1:29600")
    with pytest.raises(ConfigError, match="--master-port is 0"):
        main(["--num-per-host", "2", "--master-port", "0", "--dry-run", "--", "train.py"], "x")


def test_one_host_by_two_names_is_refused(here: Path) -> None:
    (here / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    with pytest.raises(ConfigError, match="are one and the same"):
        main(["--hostfile", "hosts", "--master-addr", "127.0.0.1", "--dry-run", "--", "train.py"], "mellow-ds launch")


def test_localhost_is_no_address_for_others(here: Path) -> None:
    (here / "hosts").write_text("localhost slots=1\nnode2.invalid slots=1\n")
    with pytest.raises(ConfigError, match="--master-addr"):
        main(["--hostfile", "hosts", "--dry-run", "--", "train.py"], "mellow-ds launch")
