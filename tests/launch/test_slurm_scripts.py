"""The scripts of launch/slurm without a cluster: what they would run, what they refuse, what they do at a job's end.

srun, squeue and scontrol are shell scripts of a few lines here; the real ones are in tests/cluster/test_slurm.py.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
TRAINING = ("train", "single_node", "torchrun")
ALL = (*TRAINING, "evaluate", "debug")
JOB = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_CPUS_PER_NODE": "72,36(x1)"}  # what SLURM tells a job
CONFIG = ("--config", "mellow")


def plain(more: dict[str, str]) -> dict[str, str]:
    """The environment, as of somebody who has no job and has set nothing."""
    mine = ("SLURM_", "MELLOW_", "SBATCH_", "MASTER_")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(mine)}, **more}


def run(script: Path | str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    path = script if isinstance(script, Path) else SCRIPTS / f"{script}.sbatch"
    return subprocess.run(
        ["bash", str(path), *arguments], cwd=ROOT, env=plain(variables), capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def slurm(**told: str) -> dict[str, str]:
    return {f"SLURM_{name}": value for name, value in {**JOB, **told}.items()}


def planned(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """The words of the command of a dry run."""
    assert done.returncode == EXIT_DONE, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  srun ")]
    return shlex.split(line)


@pytest.mark.parametrize("script", ALL)
def test_help_is_the_text_above_the_script(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == EXIT_DONE
    assert f"launch/slurm/{script}.sbatch" in done.stdout
    for option in ("--config NAME", "--deepspeed_config FILE", "--num-per-host N", "--env-file FILE", "--dry-run"):
        assert option in done.stdout
    assert ("--nodes N" in done.stdout) == (script != "single_node")
    assert "SBATCH" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("script", ALL)
def test_no_script_names_a_cluster(script: str) -> None:
    text = (SCRIPTS / f"{script}.sbatch").read_text()
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for word in ("--partition", "--account", "--qos", "--gres", "--gpus", "--constraint", "--mem", "--mail"):
        assert not any(word in line for line in asked)
    goes_on = ["--signal=B:USR1@120" in text, "#SBATCH --requeue" in text, "--open-mode=append" in text]
    assert goes_on == [script in TRAINING, script != "debug", script != "debug"]


@pytest.mark.parametrize("script", ["train", "single_node", "evaluate"])
def test_what_is_given_reaches_train_py_as_it_is(script: str) -> None:
    given = ["--train.batch_size", "8", "--save-dir", "a b", "--data.shards=$HOME/*", "it's", ""]
    words = planned(run(script, "--num-per-host", "4", *CONFIG, "--dry-run", *given))
    start = words.index("train.py")
    mode = ["--mode", "evaluate_checkpoint"] if script == "evaluate" else []
    assert words[start:] == ["train.py", *mode, *CONFIG, *given]
    assert words[start - 3 : start] == ["bash", str(SCRIPTS / "rank.sh"), str(ROOT / "launch/env.sh")]
    assert {"--nodes=1", "--ntasks=4", "--ntasks-per-node=4"} < set(words)


def test_torchrun_has_one_agent_a_node() -> None:
    words = planned(run("torchrun", "--dry-run", *CONFIG, "--num-per-host", "3", **slurm()))
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=36"} < set(words)
    start = words.index(str(SCRIPTS / "torchrun_agent.py"))
    assert words[start + 1 :] == ["3", "train.py", *CONFIG]


def test_debug_looks_and_then_trains_a_little_where_it_is_told_what() -> None:
    looks = planned(run("debug", "--dry-run"))
    assert looks[-1] == str(ROOT / "launch/check_env.py")
    both = run("debug", "--dry-run", *CONFIG, **slurm())
    commands = [shlex.split(line) for line in both.stdout.splitlines() if line.startswith("  srun ")]
    assert [command[-1] for command in commands] == [looks[-1], "false"]
    assert " ".join(commands[1]).count("--save-dir runs/debug-7 --train.max_steps 3") == 1
    without = run("debug", "--dry-run", "--train.batch_size", "2")
    assert without.returncode == EXIT_USER
    assert "--train.batch_size 2 is for training: add --config NAME" in without.stderr


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=36"}),
        ({"NTASKS_PER_NODE": "4"}, {"--ntasks=8", "--cpus-per-task=9"}),
        ({"GPUS_ON_NODE": "8"}, {"--ntasks=16", "--cpus-per-task=4", "--gpu-bind=none"}),
        ({"NTASKS_PER_NODE": "2", "GPUS_ON_NODE": "8"}, {"--ntasks=4", "--cpus-per-task=18", "--gpu-bind=none"}),
    ],
)
def test_how_many_processes_and_cpus_follow_from_the_job(told: dict[str, str], expected: set[str]) -> None:
    assert expected < set(planned(run("train", "--dry-run", *CONFIG, **slurm(**told))))


def test_what_is_said_to_the_script_goes_before_the_job() -> None:
    words = planned(
        run("train", "--nodes", "1", "--num-per-host=3", "--dry-run", *CONFIG, **slurm(NTASKS_PER_NODE="4"))
    )
    assert {"--nodes=1", "--ntasks=3", "--cpus-per-task=12"} < set(words)


@pytest.mark.parametrize(
    ("arguments", "told", "named"),
    [
        ((), slurm(), "no run configuration is given"),
        (CONFIG, {}, "this is no job of SLURM: submit it with sbatch --nodes=1 --ntasks-per-node=1"),
        ((*CONFIG, "--nodes", "3"), slurm(), "--nodes 3, and this job has 2: submit it with sbatch --nodes=3"),
        ((*CONFIG, "--nodes", "two"), slurm(), "--nodes is 'two'"),
        ((*CONFIG, "--num-per-host", "0"), slurm(), "--num-per-host is '0'"),
        ((*CONFIG, "--hostfile", "hosts"), slurm(), "takes no --hostfile"),
        ((*CONFIG, "--num-per-host", "40"), slurm(), "a node of this job has 36 CPUs for 40 processes"),
        ((*CONFIG, "--env-file", "nowhere.sh"), slurm(), "--env-file nowhere.sh is not there"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], told: dict[str, str], named: str) -> None:
    done = run("train", *arguments, **told)
    assert done.returncode == EXIT_USER
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_array_is_a_mistake_of_a_line() -> None:
    done = run("build_shards", "--dry-run")
    assert done.returncode == EXIT_USER
    assert done.stderr == "error: this is no task of a SLURM array: submit it with sbatch --array=0-15\n"


def test_the_copy_that_slurm_runs_finds_the_clone(tmp_path: Path) -> None:
    copy = tmp_path / "slurm_script"
    shutil.copy(SCRIPTS / "train.sbatch", copy)
    from_there = planned(run(copy, "--dry-run", *CONFIG, SLURM_SUBMIT_DIR=str(ROOT)))
    assert from_there == planned(run("train", "--dry-run", *CONFIG))
    named = run(copy, "--dry-run", *CONFIG, SLURM_SUBMIT_DIR=str(tmp_path), MELLOW_ROOT=str(ROOT))
    assert planned(named) == from_there
    lost = run(copy, "--dry-run", *CONFIG, SLURM_SUBMIT_DIR=str(tmp_path))
    assert lost.returncode == EXIT_USER
    assert lost.stderr == f"error: {tmp_path} is not the root of the clone: submit from there, or set MELLOW_ROOT\n"


class Stage:
    """Programs of a few lines in the place of SLURM's, and a `python` that is not there for long."""

    def __init__(self, folder: Path, srun: str, state: str = "RUNNING") -> None:
        """`srun`: what it does; `state`: what squeue says of the job."""
        self.folder = folder
        self.asked = folder / "asked"
        env = folder / "env.sh"
        env.write_text("MELLOW_PYTHON=python\n")
        self.write("srun", srun)
        self.write("squeue", f'case "$*" in *%r*) echo TimeLimit ;; *) echo {state} ;; esac')
        self.write("scontrol", f'echo "$*" >>{self.asked}')
        self.command = ["bash", str(SCRIPTS / "train.sbatch"), "--env-file", str(env), *CONFIG]

    def write(self, name: str, lines: str) -> None:
        program = self.folder / name
        program.write_text(f"#!/usr/bin/env bash\n{lines}\n")
        program.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.folder}:{os.environ['PATH']}"
        return plain({**slurm(JOB_CPUS_PER_NODE="8(x2)"), "PATH": path, **more})

    def run(self, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command, cwd=ROOT, env=self.environment(**more), capture_output=True, text=True, timeout=60,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    def was_asked(self) -> str:
        return self.asked.read_text() if self.asked.exists() else ""


@pytest.mark.parametrize("code", [EXIT_DONE, EXIT_FAULT, EXIT_USER, EXIT_INTERRUPTED, 137, 138])
def test_only_a_job_that_has_saved_is_queued_again(code: int, tmp_path: Path) -> None:
    stage = Stage(tmp_path, f"exit {code}")
    assert stage.run().returncode == code
    assert stage.was_asked() == ""


def test_a_job_that_has_saved_is_queued_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "exit 85")
    done = stage.run()
    assert done.returncode == EXIT_STOPPED
    assert stage.was_asked() == "requeue 7\n"
    assert "job 7 is queued again and goes on from the newest checkpoint" in done.stderr


def test_what_slurm_has_ended_itself_is_not_queued_again(tmp_path: Path) -> None:
    """Above all what somebody has cancelled: it would start again."""
    stage = Stage(tmp_path, "exit 85", state="COMPLETING")
    assert stage.run().returncode == EXIT_STOPPED
    assert stage.was_asked() == ""


def test_a_job_does_not_go_round_for_ever(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "exit 85")
    done = stage.run(SLURM_RESTART_COUNT="3", MELLOW_MAX_RESTARTS="3")
    assert done.returncode == EXIT_STOPPED
    assert stage.was_asked() == ""
    assert "started again 3 times already" in done.stderr


def test_where_a_job_may_not_be_queued_again_it_says_so(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "exit 85")
    stage.write("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    done = stage.run()
    assert done.returncode == EXIT_STOPPED
    assert "cannot be queued again (the reason is above): submit it again to go on" in done.stderr


@pytest.mark.parametrize(
    ("srun", "code"),
    [
        ("trap 'sleep 0.3; exit 85' USR1; {there}; while :; do sleep 0.05; done", EXIT_STOPPED),
        # a rank that had not begun to listen
        ("{there}; exec sleep 60", EXIT_STOPPED),
        # the last step was done
        ("trap 'exit 0' USR1; {there}; while :; do sleep 0.05; done", EXIT_DONE),
    ],
)
def test_the_warning_reaches_the_ranks_once(srun: str, code: int, tmp_path: Path) -> None:
    stage = Stage(tmp_path, srun.format(there=f"touch {tmp_path}/there"))
    job = subprocess.Popen(stage.command, cwd=ROOT, env=stage.environment(), stderr=subprocess.PIPE, text=True)
    wait_for_file(tmp_path / "there")
    job.send_signal(signal.SIGUSR1)
    _, said = job.communicate(timeout=30)
    assert job.returncode == code, said
    assert said.count("SIGUSR1: the ranks are asked to save and leave") == 1
    assert stage.was_asked() == ("requeue 7\n" if code == EXIT_STOPPED else "")


def test_ranks_that_do_not_save_in_time_go_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    """The time limit comes, after its warning: SLURM can be asked even then."""
    stage = Stage(tmp_path, f"trap '' USR1; touch {tmp_path}/there; sleep 2; exit 143", state="COMPLETING")
    job = subprocess.Popen(stage.command, cwd=ROOT, env=stage.environment(), stderr=subprocess.PIPE, text=True)
    wait_for_file(tmp_path / "there")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        job.send_signal(number)
        time.sleep(0.3)
    _, said = job.communicate(timeout=30)
    assert job.returncode == 143, said
    assert stage.was_asked() == "requeue 7\n"


def test_secrets_go_to_the_ranks_only_if_named(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "env | sort")
    secrets = {"HF_TOKEN": "hidden", "WANDB_API_KEY": "shown", "TOKENIZERS_PARALLELISM": "false"}
    done = stage.run(**secrets, MELLOW_SEND="WANDB_API_KEY")
    assert "hidden" not in done.stdout
    assert "WANDB_API_KEY=shown" in done.stdout
    assert "TOKENIZERS_PARALLELISM=false" in done.stdout
    plan = subprocess.run(
        [*stage.command, "--dry-run"], cwd=ROOT, env=stage.environment(**secrets), capture_output=True, text=True
    )
    assert "hidden" not in plan.stdout
    assert "not sent, secret by name: HF_TOKEN" in plan.stdout


def test_what_is_wrong_with_the_environment_is_said_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "touch started")
    (tmp_path / "env.sh").write_text("echo 'error: MELLOW_VENV is not there' >&2\nexit 2\n")
    done = stage.run()
    assert done.returncode == EXIT_USER
    assert done.stderr == "error: MELLOW_VENV is not there\n"


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_agent_takes_its_place_from_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    told = {"JOB_ID": "7", "STEP_ID": "1", "PROCID": "1", "NTASKS": "2", "LOCALID": "0", "NODEID": "1"}
    told |= {"STEP_NUM_TASKS": "2", "STEP_NODELIST": "gpu[03-04]", "STEP_NUM_NODES": "2", "NNODES": "2"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    options = loaded(SCRIPTS / "torchrun_agent.py").agent_options(4)
    assert options[:4] == ["--nnodes=2", "--node-rank=1", "--nproc-per-node=4", "--master-addr=gpu03"]


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERIFY = ROOT / "launch" / "verify_slurm_setup.py"


def test_verify_answers_in_a_line_where_there_is_no_slurm(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(VERIFY)], env=plain({"PATH": str(tmp_path)}), capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_USER
    assert done.stderr.startswith("error: no SLURM here: no sbatch, ")
    assert done.stderr.count("\n") == 1


def test_verify_says_what_it_does() -> None:
    done = subprocess.run([sys.executable, str(VERIFY), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_DONE
    assert "--no-trial" in done.stdout
    assert "1 where something is, 2 without a SLURM" in done.stdout


@pytest.mark.parametrize(
    ("partition", "options", "expected"),
    [
        ({}, [], ("ok", "1 of 2 nodes usable")),
        ({}, ["--nodes", "2"], ("FAIL", "2 are asked for")),
        ({}, ["--gpus-per-node", "8"], ("FAIL", "8 GPUs a node are asked for")),
        ({"State": "DRAIN"}, [], ("FAIL", "it is DRAIN")),
        ({"MaxTime": "UNLIMITED"}, [], ("ok", "say sbatch --time=8:00:00")),
    ],
)
def test_verify_judges_a_partition(partition: dict[str, str], options: list[str], expected: tuple[str, str]) -> None:
    verify = loaded(VERIFY)
    fields = {"State": "UP", "MaxTime": "1-00:00:00", "Default": "YES", "DefaultTime": "NONE", **partition}
    node = {"CPUTot": "64", "RealMemory": "512000", "Partitions": "gpu,all", "Gres": "gpu:a100:4(S:0-1),nvme:1"}
    nodes = {"n1": {**node, "State": "IDLE"}, "n2": {**node, "State": "DOWN*+DRAIN", "Reason": "fan"}}
    chosen = verify.parse_arguments(["--nodes", "1", *options])
    (line,) = verify.check_partitions({"gpu": fields}, nodes, "gpu", chosen)
    assert line.state == expected[0]
    assert expected[1] in line.found + line.cure
    (down,) = verify.check_nodes(nodes)
    assert (down.state, down.found) == ("note", "n2 is DOWN*+DRAIN (fan)")


def test_verify_names_a_partition_that_there_is_not() -> None:
    verify = loaded(VERIFY)
    first, *_ = verify.check_partitions({"gpu": {"State": "UP"}}, {}, "gpus", verify.parse_arguments([]))
    assert (first.state, first.found) == ("FAIL", "no partition 'gpus'; there are: gpu")


@pytest.mark.parametrize(
    ("settings", "check", "state", "words"),
    [
        ({"KillWait": "5 sec"}, "KillWait", "note", "save often"),
        ({"KillWait": "30 sec"}, "KillWait", "ok", "30 s from SIGTERM"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}, "preemption", "ok", "saves and starts again"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "CANCEL"}, "preemption", "note", "submit it again"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "GANG,SUSPEND"}, "preemption", "note", "another partition"),
        ({"ProctrackType": "proctrack/cgroup"}, "signals", "ok", "passes them on"),
        ({"ProctrackType": "proctrack/linuxproc"}, "signals", "ok", "every process of a task"),
        ({"TaskPlugin": "task/affinity"}, "TaskPlugin", "note", "--exclusive"),
        ({"JobRequeue": "0"}, "requeue", "ok", "ask for it"),
    ],
)
def test_verify_judges_how_jobs_end(settings: dict[str, str], check: str, state: str, words: str) -> None:
    lines = [line for line in loaded(VERIFY).check_stopping(settings, {}) if line.check == check]
    assert [line.state for line in lines] == [state]
    assert words in lines[0].found + lines[0].cure


def test_verify_reads_what_scontrol_prints() -> None:
    verify = loaded(VERIFY)
    assert verify.settings("KillWait                = 30 sec \nX = (null)\n") == {"KillWait": "30 sec", "X": "(null)"}
    shown = "PartitionName=a State=UP MaxTime=UNLIMITED\nPartitionName=b State=DOWN\n"
    assert verify.records(shown)["b"]["State"] == "DOWN"
