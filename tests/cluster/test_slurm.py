"""The scripts of launch/slurm on a real cluster: the run of one host, jobs that are stopped and go on by themselves."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.noting import read_notes
from tests.cli.runs import ROOT, forked
from tests.cluster.hosts import NODES
from tests.cluster.runs import losses, processes, train_arguments, wrote_steps
from tests.cluster.slurm import Job, Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500)]
SCRIPTS = "launch/slurm"
STEPS = 150  # from the last stop at step 20 on it goes on for some seconds: none is asked for too late
AGAIN = "is queued again and goes on from the newest checkpoint"
START_SECONDS = 300  # until ranks that import torch are at work, beside other jobs and tests
SOON_SECONDS = 120  # for what SLURM does by itself: it looks at time limits every 30 s


@pytest.fixture(autouse=True)
def no_job_left(slurm: Slurm) -> Iterator[None]:
    """What a test that fails leaves in the queue is not the next one's."""
    yield
    slurm.run("scancel", "--me")


class Undisturbed(NamedTuple):
    """A run on one host that nothing stopped."""

    run: Path
    notes: list[list[tuple[int, list[str]]]]  # by rank: the example ids of each step


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = train_arguments(corpus, folder / "run", max_steps=STEPS)
    for done in forked("noting.py", *arguments, f"--notes={folder}/notes", num_ranks=2):
        assert done.returncode == 0, done.stderr[-3000:]
    return Undisturbed(folder / "run", [read_notes(folder / "notes", rank) for rank in range(2)])


def written_env(folder: Path, python: str) -> Path:
    """An environment file whose `python` is a shell script with these lines."""
    program = folder / "python"
    program.write_text(f"#!/usr/bin/env bash\n{python}\n")
    program.chmod(0o755)
    file = folder / "env.sh"
    file.write_text(f"source {ROOT}/launch/env.sh\nMELLOW_PYTHON={program}\n")
    return file


def submit(slurm: Slurm, script: str, *arguments: object, options: tuple[str, ...] = (), **variables: str) -> Job:
    """Two nodes, a task each, unless `options` say more."""
    log = f"--output={slurm.hosts.folder}/%j.log"
    return slurm.submit("--nodes=2", log, *options, f"{SCRIPTS}/{script}", *arguments, **variables)


def wait_to_start_again(job: Job, restarts: int) -> None:
    """Until the job is queued for the given time, and, without the two minutes that SLURM waits, runs."""

    def is_queued() -> bool:
        fields = job.fields()
        # SLURM says from when on it may start once it has cleaned up; told before, it would start among what is left
        waits = fields["JobState"] == "PENDING" and fields["EligibleTime"] > time.strftime("%Y-%m-%dT%H:%M:%S")
        assert fields["JobState"] != "FAILED", f"{fields}\n{job.said()[-3000:]}"
        return fields["Restarts"] == str(restarts) and waits and not any(left(host) for host in NODES)

    def left(host: str) -> set[int]:
        return processes(job.slurm.hosts, host, f"[{job.number}.")  # slurmstepd: [7.batch]

    job.wait_for(is_queued, SOON_SECONDS)
    time.sleep(10)  # or the end of the first life, still on its way to the controller, is taken for that of the second
    told = job.slurm.run("scontrol", "update", f"JobId={job.number}", "StartTime=now", "TimeLimit=30")
    assert told.returncode == 0, told.stderr
    job.wait_for(lambda: job.state not in ("PENDING", "CONFIGURING"), SOON_SECONDS)  # a short one has ended by now


def stand_still_at(job: Job, run: Path, steps: int, words: str) -> int:
    """Stop the rank on node2 in the middle of a step after `steps` steps; the process."""

    def is_there() -> bool:
        assert job.state != "FAILED", job.said()[-3000:]
        return wrote_steps(run, steps)

    job.wait_for(is_there, START_SECONDS)
    (rank,) = [pid for pid in processes(job.slurm.hosts, "node2", words) if not is_agent(pid)]
    os.kill(rank, signal.SIGSTOP)
    return rank


def is_agent(pid: int) -> bool:
    return b"torchrun_agent" in Path(f"/proc/{pid}/cmdline").read_bytes()


def assert_same_run(run: Path, straight: Path) -> None:
    """Losses and final weights of a run that nothing stopped."""
    assert losses(run) == pytest.approx(losses(straight), rel=1e-6)
    assert len(losses(run)) == STEPS
    last = f"checkpoints/step-{STEPS:06d}"
    weights, expected = (
        {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (run / last, straight / last)
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-7)


def stopped_three_times(slurm: Slurm, corpus: Path, folder: Path) -> Path:
    """train.sbatch, in the middle of steps: requeued by somebody, warned by the shell, requeued; the run folder."""
    run = folder / "run"
    noting = f'exec {sys.executable} {ROOT}/tests/cli/noting.py "${{@:2}}" --notes={folder}/notes-$SLURM_PROCID'
    arguments = ["--env-file", written_env(folder, noting), *train_arguments(corpus, run, max_steps=STEPS)]
    job = submit(slurm, "train.sbatch", *arguments)

    stand_still_at(job, run, 3, "noting.py")
    assert slurm.run("scontrol", "requeue", job.number).returncode == 0  # wakes it up, too
    wait_to_start_again(job, 1)

    rank = stand_still_at(job, run, 10, "noting.py")
    assert slurm.run("scancel", "--batch", "--signal=USR1", job.number).returncode == 0
    go_on_once_told(job, rank, 1)
    wait_to_start_again(job, 2)

    stand_still_at(job, run, 20, "noting.py")
    assert slurm.run("scontrol", "requeue", job.number).returncode == 0
    wait_to_start_again(job, 3)
    job.wait_for(lambda: len(losses(run)) == STEPS, START_SECONDS)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)  # all is done: nothing to go on with
    assert job.end(START_SECONDS) == ("COMPLETED", 0), job.said()[-3000:]
    assert job.said().count(AGAIN) == 1  # not where SLURM had requeued it
    return run


def stopped_under_torchrun(slurm: Slurm, corpus: Path, folder: Path) -> Path:
    """torchrun.sbatch, warned before anything has begun, then by SLURM before a time limit; the run folder."""
    run = folder / "run"
    job = submit(slurm, "torchrun.sbatch", *train_arguments(corpus, run, max_steps=STEPS), options=("--time=30",))
    job.wait_for(lambda: any(map(is_agent, processes(slurm.hosts, "node2", "torchrun_agent"))), START_SECONDS)
    assert slurm.run("scancel", "--batch", "--signal=USR1", job.number).returncode == 0
    wait_to_start_again(job, 1)

    rank = stand_still_at(job, run, 5, "train.py")
    minutes = int(job.fields()["RunTime"].split(":")[1]) + 1
    assert slurm.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}").returncode == 0
    go_on_once_told(job, rank, 2)
    wait_to_start_again(job, 2)
    assert job.end(START_SECONDS) == ("COMPLETED", 0), job.said()[-3000:]
    assert job.said().count(AGAIN) == 2
    return run


def go_on_once_told(job: Job, rank: int, times: int) -> None:
    """Let a rank go on when the shell of its job has been told to stop, and has told the ranks."""
    job.wait_for(lambda: job.said().count("SIGUSR1: the ranks are asked") == times, SOON_SECONDS)
    time.sleep(0.5)
    os.kill(rank, signal.SIGCONT)


class Stopped(NamedTuple):
    """Runs that were stopped and went on."""

    by_srun: Path
    by_torchrun: Path


@pytest.fixture(scope="module")
def stopped(slurm: Slurm, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Both side by side."""
    places = [tmp_path_factory.mktemp(name) for name in ("srun", "torchrun")]
    with ThreadPoolExecutor() as pool:
        by_srun = pool.submit(stopped_three_times, slurm, corpus, places[0])
        by_torchrun = pool.submit(stopped_under_torchrun, slurm, corpus, places[1])
        return Stopped(by_srun.result(), by_torchrun.result())


def test_jobs_that_are_stopped_end_as_if_nothing_had_been(stopped: Stopped, undisturbed: Undisturbed) -> None:
    """No example is lost or comes twice, and the weights are those of a run that nothing stopped."""
    assert_same_run(stopped.by_srun, undisturbed.run)
    assert_same_run(stopped.by_torchrun, undisturbed.run)
    # each rank has noted every step once, in order, with the very examples
    notes = [read_notes(stopped.by_srun.parent / f"notes-{rank}", 0) for rank in range(2)]
    assert notes == undisturbed.notes


STAND_IN = """
echo "task $SLURM_PROCID of $SLURM_NTASKS on $(hostname) with $SLURM_CPUS_PER_TASK CPUs: ${*@Q} token=${HF_TOKEN:-}"
case $3 in
leave-*) exit "${3#leave-}" ;;
saves-once) exit $((${SLURM_RESTART_COUNT:-0} ? 0 : 85)) ;;
stays) trap 'exit 85' TERM USR1; while :; do sleep 0.1; done ;;
esac
"""


def test_exit_codes_what_is_queued_again_and_what_a_task_gets(slurm: Slurm, tmp_path: Path) -> None:
    """With something in the place of Python that takes no time."""
    env = written_env(tmp_path, STAND_IN)

    def job(script: str, does: str, *more: object, options: tuple[str, ...] = ()) -> Job:
        return submit(slurm, script, "--env-file", env, "--config", does, *more, options=options, HF_TOKEN="hidden")

    leaving = {code: job("train.sbatch", f"leave-{code}") for code in (0, 1, 2, 130)}
    cancelled, saves = job("train.sbatch", "stays"), job("train.sbatch", "saves-once")
    by_gpus = job("train.sbatch", "leave-0", "a b", "$c", options=("--gpus-per-node=2", "--cpus-per-task=4"))
    on_one = job("single_node.sbatch", "leave-0", options=("--nodes=1", "--ntasks-per-node=3", "--cpus-per-task=2"))
    for code, left in leaving.items():
        assert left.end(SOON_SECONDS) == ("FAILED" if code else "COMPLETED", code), left.said()
        assert left.fields()["Restarts"] == "0"

    wait_to_start_again(saves, 1)
    assert saves.end(SOON_SECONDS) == ("COMPLETED", 0), saves.said()

    cancelled.wait_for(lambda: cancelled.said().count("task ") == 2, SOON_SECONDS)
    assert slurm.run("scancel", cancelled.number).returncode == 0
    cancelled.wait_for(lambda: "SLURM has ended this job itself" in cancelled.said(), SOON_SECONDS)
    cancelled.wait_for(lambda: cancelled.state == "CANCELLED", SOON_SECONDS)
    assert cancelled.fields()["Restarts"] == "0"

    assert by_gpus.end(SOON_SECONDS) == ("COMPLETED", 0), by_gpus.said()
    tasks = sorted(line for line in by_gpus.said().splitlines() if line.startswith("task"))
    given = "with 2 CPUs: 'train.py' '--config' 'leave-0' 'a b' '$c' token="
    assert tasks == [f"task {rank} of 4 on node{rank // 2 + 1} {given}" for rank in range(4)]
    assert on_one.end(SOON_SECONDS) == ("COMPLETED", 0), on_one.said()
    assert len(re.findall("^task . of 3 on node1 ", on_one.said(), re.MULTILINE)) == 3


def test_the_set_up_is_judged(slurm: Slurm) -> None:
    verify = [sys.executable, "launch/verify_slurm_setup.py"]
    done = slurm.run(*verify)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "main (to be used): 2 of 2 nodes usable, 8 CPUs 4 GB gpu:4; time limit 02:00:00" in done.stdout
    assert "all-reduce           2 ranks on 2 nodes, 0 GPUs on the first, gloo, met at node1:" in done.stdout
    assert done.stdout.endswith("nothing is in the way of training\n")
    refused = {
        ("--nodes", "3"): "3 are asked for: choose another partition",
        ("--partition", "gpu"): "no partition 'gpu'; there are: main",
        ("--num-per-host", "99"): "fewer --num-per-host or --gpus-per-node",
    }
    for options, cure in refused.items():
        done = slurm.run(*verify, *options)
        assert done.returncode == 1, done.stdout + done.stderr
        (failed,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
        assert cure in failed
    assert not slurm.run("squeue", "-h").stdout.strip()
    lost = slurm.run(*verify, SLURM_CONF=str(slurm.folder / "nowhere.conf"))
    assert lost.returncode == 2
    assert lost.stderr.startswith(f"error: SLURM_CONF is {slurm.folder}/nowhere.conf, which is not there")
