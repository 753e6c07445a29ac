"""The scripts of launch/ssh and launch/deepspeed: help, dry runs, arguments that a shell would change, bad input."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from mellow_ds.launcher.hostfile import read_hostfile

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTS = ["deepspeed/pdsh.sh", "deepspeed/openmpi.sh", "ssh/multi_node.sh", "ssh/torchrun.sh", "ssh/pdsh.sh"]
HERE = ["deepspeed/single_node.sh", "ssh/single_node.sh", "ssh/torchrun_node.sh", "ssh/per_rank.sh"]
PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
ODD = ["a b", "it's", "$HOME", "`id`", '"', ";", "*", "", "\\", "%n", "100%", "a  $b \"c\" 'd' \\e"]
SHOWN = r"would run|rank 0|ranks? on"


def run(name: str, *words: str, folder: Path = ROOT, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A script of launch/ in the environment of the tests, started from `folder`."""
    dropped = {"CUDA_VISIBLE_DEVICES", "MELLOW_SEND", *PLACE}
    base = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.run(
        [str(ROOT / "launch" / name), *words], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**base, "MELLOW_VENV": sys.prefix, **variables},
    )  # fmt: skip


def dry(name: str, *words: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A dry run that has to succeed."""
    hosts = folder / "hosts"
    hosts.write_text("# two and one\nnode1 slots=2\n\nnode2 slots=1 # the small one\n")
    more = ["--hostfile", str(hosts)] if name in HOSTS else []
    place = PLACE if name == "ssh/per_rank.sh" else {}
    done = run(name, "--dry-run", *more, "--config", "quickstart", *words, **{**place, **variables})
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", [*HOSTS, *HERE])
def test_help_is_the_usage_and_nothing_else(name: str) -> None:
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{name} " in done.stdout
    assert "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout
    # every option that the script takes is told, and none else
    taken = re.search(r"^read_arguments (.*)-- ", (ROOT / "launch" / name).read_text(), re.MULTILINE)
    assert taken is not None
    always = {"config", "deepspeed_config", "env-file", "dry-run", "help"}
    assert set(re.findall(r"^  --([\w-]+) ", done.stdout, re.MULTILINE)) - always == set(taken[1].split())


@pytest.mark.parametrize("name", [*HOSTS, *HERE])
def test_a_dry_run_shows_the_command_and_the_variables(name: str, tmp_path: Path) -> None:
    done = dry(name, "--data.shards", "a b", folder=tmp_path, MELLOW_TOLD="told", HF_TOKEN="hidden-value")
    assert re.search(SHOWN, done.stdout)
    assert "--config quickstart" in done.stdout
    assert "hidden-value" not in done.stdout
    if name not in ("ssh/torchrun_node.sh", "ssh/per_rank.sh"):  # nothing travels by hand
        assert "MELLOW_TOLD=told" in done.stdout
        assert re.search("not sent, secret by name: .*HF_TOKEN", done.stdout)


@pytest.mark.parametrize("name", ["deepspeed/pdsh.sh", "deepspeed/openmpi.sh", "ssh/multi_node.sh"])
def test_a_secret_travels_when_it_is_named(name: str, tmp_path: Path) -> None:
    done = dry(name, folder=tmp_path, HF_TOKEN="named", MELLOW_SEND="HF_TOKEN MELLOW_SET=here")
    assert "HF_TOKEN=(not shown)" in done.stdout
    assert "MELLOW_SET=here" in done.stdout
    assert "not sent" not in done.stdout


def test_a_dry_run_is_done_before_torch_would_be_there(tmp_path: Path) -> None:
    """In a Python that has no torch: a dry run answers in under 1 s, and an import takes longer."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "deepspeed", "numpy", "transformers"):
        (blocked / f"{name}.py").write_text("raise ImportError('not for a dry run')\n")
    for name in ("deepspeed/pdsh.sh", "ssh/torchrun.sh"):
        dry(name, folder=tmp_path, PYTHONPATH=f"{ROOT}:{blocked}")


@pytest.mark.parametrize("name", ["ssh/torchrun_node.sh", "ssh/per_rank.sh", "deepspeed/single_node.sh"])
def test_odd_arguments_stand_in_the_command_as_they_are(name: str, tmp_path: Path) -> None:
    words = [word for odd in ODD for word in ("--save-dir", odd)]
    done = dry(name, *words, folder=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if " train.py " in line]
    assert shlex.split(line)[-2 * len(ODD) :] == words


@pytest.mark.parametrize("name", ["deepspeed/pdsh.sh", "deepspeed/openmpi.sh"])
def test_deepspeed_sends_nothing_by_itself(name: str, tmp_path: Path) -> None:
    """Its runner would send whatever begins so, secrets too, and unquoted; what travels is in the plan."""
    from deepspeed.launcher.runner import EXPORT_ENVS

    secrets = {f"{beginning}_PASSWORD": "hidden-value" for beginning in (*EXPORT_ENVS, "NCCL")}
    done = dry(name, folder=tmp_path, **secrets)
    (line,) = [line for line in done.stdout.splitlines() if " train.py " in line]
    words = shlex.split(line)
    before = words[: words.index("deepspeed.launcher.runner")]
    assert secrets.keys() <= {word for dash, word in pairwise(before) if dash == "-u"}
    assert "hidden-value" not in done.stdout


def test_odd_arguments_through_pdsh_and_the_shell_of_a_host(tmp_path: Path) -> None:
    """What DeepSpeed's runner does to them, then what pdsh and a shell do, leaves them as they were."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    words = [word for odd in ODD for word in ("--save-dir", odd)]
    done = dry("deepspeed/pdsh.sh", *words, folder=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if " train.py " in line]
    command = shlex.split(line)
    options = parse_args(command[command.index("deepspeed.launcher.runner") + 1 :])
    sent = PDSHRunner(options, "e30=").user_arguments
    on_host = " ".join(sent).replace("%%", "%")  # pdsh joins by blanks
    for shell in ("bash", "sh"):
        read = subprocess.run([shell, "-c", f"printf '%s\\0' {on_host}"], capture_output=True, check=True, cwd=tmp_path)
        assert read.stdout.decode().split("\0")[-2 * len(ODD) - 1 : -1] == words


def test_arguments_keep_their_order_and_both_forms_are_read() -> None:
    words = [
        "--train.max_steps",
        "3",
        "--config=quickstart",
        "--deepspeed_config=ds_configs/zero1.json",
        "--seed",
        "-1",
    ]
    done = run("ssh/torchrun_node.sh", "--num-per-host=2", *words, "--dry-run")
    assert done.returncode == 0, done.stderr
    expected = "train.py --train.max_steps 3 --config quickstart --deepspeed_config ds_configs/zero1.json --seed -1"
    assert expected in done.stdout
    assert "--nproc-per-node=2" in done.stdout


def test_they_run_from_any_folder(tmp_path: Path) -> None:
    done = run("ssh/per_rank.sh", "--dry-run", "--config", "quickstart", folder=tmp_path, **PLACE)
    assert f"would run, in {tmp_path}" in done.stdout
    assert f"{ROOT}/train.py --config quickstart" in done.stdout


def test_filters_and_slots_reach_deepspeed(tmp_path: Path) -> None:
    assert "--include node1:0,1@node2:0 " in dry("deepspeed/pdsh.sh", folder=tmp_path).stdout
    assert "--include node1:1 " in dry("deepspeed/pdsh.sh", "--include", "node1:1", folder=tmp_path).stdout
    assert "--include node1:0,1 " in dry("deepspeed/pdsh.sh", "--exclude", "node2", folder=tmp_path).stdout
    assert "--include node1:0@node2:0 " in dry("deepspeed/pdsh.sh", "--num-per-host", "1", folder=tmp_path).stdout
    narrowed = dry("deepspeed/single_node.sh", folder=tmp_path, CUDA_VISIBLE_DEVICES="3,1").stdout
    assert "--include localhost:1,3 " in narrowed


def test_filters_and_slots_reach_torchrun(tmp_path: Path) -> None:
    said = dry("ssh/pdsh.sh", folder=tmp_path).stdout
    assert "-w node1,node2 " in said
    assert "NODE_RANK=%n MELLOW_HOST_RANKS=2,1 " in said
    said = dry("ssh/torchrun.sh", "--include", "node1:1@node2", folder=tmp_path).stdout
    assert "MELLOW_HOST_RANKS=1,1" in said
    assert "MELLOW_HOST_DEVICES=1;" in said
    lists = {"MELLOW_HOST_RANKS": "2,1", "MELLOW_HOST_DEVICES": ";3", "MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
    said = run("ssh/torchrun_node.sh", "--dry-run", "--config", "quickstart", RANK="1", **lists).stdout
    assert "--nnodes=2 --node-rank=1 --nproc-per-node=1 --master-addr=node1 --master-port=29501" in said


def test_what_a_hosts_environment_file_sets_stands_above_what_travels(tmp_path: Path) -> None:
    """And what is named above both; values that a shell would change arrive as they are."""
    from mellow_ds.cli.script_plan import deepspeed_env_lines, export_commands
    from mellow_ds.launcher.environment import Travelling

    odd = {f"ODD_{number}": value for number, value in enumerate([*ODD, "${HOME}", "a}b", "}", "x=y", " ends "])}
    travelling = Travelling(allowed={**odd, "SET": "here"}, named={f"N{name}": value for name, value in odd.items()})
    wanted = {**odd, **travelling.named, "SET": "on the host"}
    deepspeeds = []
    for line in deepspeed_env_lines(travelling):  # as MultiNodeRunner.add_export and pdsh take it
        name, value = line.split("=", maxsplit=1)
        value = value.strip()
        value = f'"{value}"' if re.search(r"[^\w@%+=:,./-]", value) else value
        deepspeeds.append(f"export {name}={value}; ".replace("%%", "%"))
    # DeepSpeed's runner needs bash there anyway, by its `source`
    for commands, shells in ((export_commands(travelling), ("bash", "sh")), ("".join(deepspeeds), ("bash",))):
        for shell in shells:
            printed = subprocess.run(
                [shell, "-c", f"{commands} /usr/bin/env -0"], cwd=tmp_path, env={"SET": "on the host"},
                capture_output=True, check=True,
            ).stdout.decode()  # fmt: skip
            found = dict(entry.split("=", maxsplit=1) for entry in printed.split("\0") if entry)
            assert {name: found[name] for name in wanted} == wanted


# script, its words but for `--config quickstart`, what the one line says
BAD = {
    "a config that is none": ("deepspeed/single_node.sh", "--config quikstart", "quikstart"),
    "an unknown key": ("deepspeed/single_node.sh", "--train.bath_size 3", "train.batch_size"),
    "an engine JSON that is not there": ("ssh/pdsh.sh", "--hostfile HOSTS --deepspeed_config zero9.json", "zero9.json"),
    "no value": ("ssh/single_node.sh", "--deepspeed_config", "--deepspeed_config has no value"),
    "no hostfile": ("deepspeed/pdsh.sh", "", "no hostfile is given"),
    "a hostfile that is not there": ("deepspeed/pdsh.sh", "--hostfile /no/hosts", "/no/hosts is not there"),
    "a line that is none": ("deepspeed/openmpi.sh", "--hostfile WRONG", "'node1 slots' is not `name slots=N`"),
    "an unknown host": ("ssh/pdsh.sh", "--hostfile HOSTS --include node7", "host 'node7'"),
    "a GPU of mpirun": ("deepspeed/openmpi.sh", "--hostfile HOSTS --include node1:1", "single GPUs"),
    "no number": ("ssh/single_node.sh", "--num-per-host two", "--num-per-host is 'two'"),
    "an option of others": ("ssh/single_node.sh", "--hostfile HOSTS", "takes no --hostfile"),
    "no environment file": ("ssh/single_node.sh", "--env-file /no/env.sh", "/no/env.sh is not there"),
    "no node rank": ("ssh/torchrun_node.sh", "--nodes 2 --master a", "set NODE_RANK"),
    "a high node rank": ("ssh/torchrun_node.sh", "--nodes 2 --master a --node-rank 2", "the node rank is '2'"),
    "no master": ("ssh/torchrun_node.sh", "--nodes 2 --node-rank 1", "--master HOST"),
    "no rank": ("ssh/per_rank.sh", "", "RANK is not set"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_line(fault: str, tmp_path: Path) -> None:
    name, options, message = BAD[fault]
    (tmp_path / "HOSTS").write_text("node1 slots=2\nnode2 slots=1\n")
    (tmp_path / "WRONG").write_text("node1 slots\n")
    words = [str(tmp_path / word) if word in ("HOSTS", "WRONG") else word for word in options.split()]
    done = run(name, "--config", "quickstart", *words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_variables_that_cannot_be_are_one_line() -> None:
    done = run("ssh/single_node.sh", "--data.shards", "SHARDS")
    assert done.stderr == "error: no run configuration is given: add --config NAME, a recipe or a YAML file\n"
    done = run("deepspeed/single_node.sh", "--config", "quickstart", CUDA_VISIBLE_DEVICES="GPU-8932f937")
    assert done.returncode == 2
    assert done.stderr.startswith("error: CUDA_VISIBLE_DEVICES is 'GPU-8932f937'")
    done = run("ssh/per_rank.sh", "--config", "quickstart", **{**PLACE, "RANK": "2"})
    assert done.stderr == "error: RANK is 2; of 2 ranks it is one of 0 to 1\n"


# -- launch/env.sh ----------------------------------------------------------------------------------------------------


def sourced(root: Path, *shown: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Source a clone's launch/env.sh twice, as a script that starts a script does; print variables."""
    show = " ".join(f'"${{{name}:-}}"' for name in shown)
    code = f"set -euo pipefail; source launch/env.sh; source launch/env.sh; printf '%s\\n' {show}"
    return subprocess.run(
        ["bash", "-c", code], cwd=root, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(root), **variables},
    )  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """launch/ alone."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("env.local.sh"))
    return root


def test_the_local_file_is_read_and_a_named_environment_taken_as_it_is(clone: Path) -> None:
    venv = clone.parent / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (clone / "launch" / "env.local.sh").write_text(
        f"export MELLOW_VENV={venv} MELLOW_INTERFACE=ib0 MELLOW_CACHE=/scratch NCCL_IB_HCA='^mlx5_3' HF_HOME=/mine\n"
    )
    names = [
        "MELLOW_PYTHON",
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "NCCL_IB_HCA",
        "HF_HOME",
        "TORCH_HOME",
        "PATH",
    ]
    done = sourced(clone, *names, GLOO_SOCKET_IFNAME="eth1")
    assert (done.returncode, done.stderr) == (0, "")
    *values, path = done.stdout.splitlines()
    assert values == [f"{venv}/bin/python", "ib0", "eth1", "^mlx5_3", "/mine", "/scratch/torch"]
    assert path == f"{venv}/bin:{os.environ['PATH']}"  # once


def test_a_conda_environment_is_activated_by_name(clone: Path) -> None:
    """A stand-in for conda: what it is asked, and what its activation leaves."""
    base = clone.parent / "conda"
    (base / "etc" / "profile.d").mkdir(parents=True)
    (base / "bin").mkdir()
    (base / "bin" / "conda").write_text(f"#!/bin/bash\n[[ \"$*\" == 'info --base' ]] && echo {base}\n")
    (base / "bin" / "conda").chmod(0o755)
    (base / "etc" / "profile.d" / "conda.sh").write_text(
        f'conda() {{ echo "conda $*" >&2; : "$not_set"; [[ $2 == mine ]] && export CONDA_PREFIX={base}/envs/$2; }}\n'
    )
    done = sourced(clone, "MELLOW_PYTHON", MELLOW_CONDA="mine", CONDA_EXE=str(base / "bin" / "conda"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{base}/envs/mine/bin/python\n"
    assert done.stderr == "conda activate mine\n"  # once
    done = sourced(clone, MELLOW_CONDA="yours", CONDA_EXE=str(base / "bin" / "conda"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: launch/env.sh: conda cannot activate MELLOW_CONDA=yours"


def test_modules_are_loaded(clone: Path) -> None:
    """By the real `module`, where there is one; a script that has `set -u` sources it."""
    files = clone.parent / "modulefiles" / "cuda"
    files.mkdir(parents=True)
    (files / "12.8").write_text("#%Module1.0\nsetenv CUDA_HOME /opt/cuda-12.8\n")
    variables = {"MELLOW_VENV": sys.prefix, "MODULEPATH": str(files.parent)}
    done = sourced(clone, "CUDA_HOME", MELLOW_MODULES="cuda/12.8", **variables)
    if not Path("/etc/profile.d/modules.sh").exists():
        assert done.returncode == 2
        assert done.stderr == "error: launch/env.sh: MELLOW_MODULES is set, and there is no `module` command here\n"
        pytest.skip("environment-modules is not installed")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "/opt/cuda-12.8\n"
    done = sourced(clone, MELLOW_MODULES="cuda/99", **variables)
    assert done.returncode == 2
    assert "cuda/99" in done.stderr  # module's own reason
    assert done.stderr.splitlines()[-1] == "error: launch/env.sh: cannot load the modules cuda/99"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MELLOW_VENV": "/nowhere"}, "MELLOW_VENV is /nowhere, and /nowhere/bin/python is not there"),
        ({"MELLOW_VENV": "/a", "MELLOW_CONDA": "b"}, "MELLOW_VENV and MELLOW_CONDA are both set: keep one"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line(clone: Path, variables: dict[str, str], message: str) -> None:
    done = sourced(clone, **variables)
    assert done.returncode == 2
    assert done.stderr == f"error: launch/env.sh: {message}\n"


def test_no_script_names_a_machine_or_an_environment() -> None:
    for path in (ROOT / "launch").rglob("*.sh"):
        text = path.read_text()
        assert not re.search(r"conda activate [\w.]+|/(home|scratch|shared|work)/\w", text), path


def test_the_examples_are_taken(clone: Path) -> None:
    hosts = read_hostfile(ROOT / "launch" / "deepspeed" / "hostfile.example")
    assert [(host.name, len(host.slots)) for host in hosts] == [("node1", 4), ("node2", 4)]
    (clone / "launch" / "env.local.sh.example").rename(clone / "launch" / "env.local.sh")
    done = sourced(clone, "MELLOW_PYTHON", MELLOW_VENV=sys.prefix)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{sys.prefix}/bin/python\n")


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
