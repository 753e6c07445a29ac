"""Ranks from the variables of each launcher, as its program was seen to set them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mellow_ds.errors import ConfigError
from mellow_ds.world import World
from tests.guide import quoted

ROOT = Path(__file__).resolve().parent.parent
# rank 1 of 2 on one host, printed once from the real programs: torch 2.11, DeepSpeed 0.19.8, OpenMPI 4.1, MPICH 4.0
TORCHRUN = {
    "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29655", "RANK": "1", "ROLE_NAME": "default", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2",
}  # fmt: skip
DEEPSPEED = {
    "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29656", "RANK": "1", "WORLD_SIZE": "2",
}  # fmt: skip
OPENMPI = {
    "OMPI_APP_CTX_NUM_PROCS": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_ess_base_vpid": "1", "OMPI_UNIVERSE_SIZE": "2", "PMIX_RANK": "1", "PMIX_NAMESPACE": "555548673",
}  # fmt: skip
MPICH = {"HYDI_CONTROL_FD": "7", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "8", "PMI_RANK": "1",
         "PMI_SIZE": "2"}  # fmt: skip
MELLOW = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
          "MASTER_PORT": "29500", "MELLOW_LAUNCH_ID": "front-12-34"}  # fmt: skip
HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
# a job of 3 nodes with 4, 4 and 3 tasks; this is task 9, on the last node
SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "11", "SLURM_TASKS_PER_NODE": "4(x2),3", "SLURM_NNODES": "3"}
SLURM = {
    **SLURM_JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[003-005]",
}  # fmt: skip
# the batch script of that job, the shell of salloc, and the same as the interactive step of later versions
NO_RANKS = {
    "batch script": {**SLURM_JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    "batch step with a number": {**SLURM_JOB, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"},
    "salloc": SLURM_JOB,
    "salloc, interactive step": {**SLURM_JOB, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(1, 2, 1, "torchrun", 2)),
        (DEEPSPEED, World(1, 2, 1, "deepspeed", 2)),
        (OPENMPI, World(1, 2, 1, "OpenMPI", 2)),
        (MPICH, World(1, 2, 1, "MPICH", 2)),
        (MELLOW, World(3, 4, 1, "mellow-ds launch", 2, "front-12-34")),
        (HAND, World(3, 4, 1, "hand", 4)),
        ({**HAND, "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1, "hand", 2)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World(0, 1, 0, "hand", 1)),
        (SLURM, World(9, 11, 1, "SLURM", 3)),
        ({**SLURM, "SLURM_NODEID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, World(3, 11, 3, "SLURM", 4)),
        # counts of something else, such as a part of a heterogeneous job, are not taken
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4"}, World(9, 11, 1, "SLURM", 11)),
        ({**SLURM, "SLURM_GPUS_PER_TASK": "1"}, World(9, 11, 1, "SLURM", 3, has_own_devices=True)),
    ],
)  # fmt: skip
def test_each_launcher_is_read(env: dict[str, str], world: World) -> None:
    assert World.from_env(env) == world


@pytest.mark.parametrize("where", NO_RANKS)
def test_what_is_no_task_of_slurm_is_no_rank(where: str) -> None:
    assert World.from_env(NO_RANKS[where]) == World()


@pytest.mark.parametrize(
    ("env", "launcher", "rank"),
    [
        # what starts processes itself counts them; what it was started by counts it
        ({**SLURM, **TORCHRUN}, "torchrun", 1),
        ({**SLURM, **DEEPSPEED}, "deepspeed", 1),
        ({**SLURM, **MELLOW}, "mellow-ds launch", 3),
        ({**MELLOW, **TORCHRUN}, "torchrun", 1),
        ({**SLURM, **OPENMPI}, "OpenMPI", 1),
        ({**SLURM, **MPICH}, "MPICH", 1),
        # one launcher in two languages
        ({**SLURM, "PMI_RANK": "9", "PMI_SIZE": "11", "PMI_FD": "3"}, "SLURM", 9),
        ({**SLURM, "RANK": "9", "WORLD_SIZE": "11"}, "hand", 9),
        ({**OPENMPI, "RANK": "1", "WORLD_SIZE": "2"}, "hand", 1),
        # scripts export WORLD_SIZE for libraries
        ({**SLURM, "WORLD_SIZE": "11"}, "SLURM", 9),
        ({**NO_RANKS["batch script"], **MELLOW}, "mellow-ds launch", 3),
        ({**NO_RANKS["batch script"], **HAND}, "hand", 3),
    ],
)
def test_one_launcher_within_another(env: dict[str, str], launcher: str, rank: int) -> None:
    world = World.from_env(env)
    assert (world.launcher, world.rank) == (launcher, rank)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({**SLURM, "WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not, and SLURM_STEP_NUM_TASKS is 11"),
        ({**SLURM, "RANK": "2"}, "RANK is set but WORLD_SIZE is not"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1 but WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({**SLURM, "SLURM_PROCID": "11"}, "SLURM_PROCID is 11 but SLURM_STEP_NUM_TASKS is 11"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a whole number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is '', not a whole number"),
        ({"RANK": "1_0", "WORLD_SIZE": "20"}, "RANK is '1_0', not a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2 but LOCAL_WORLD_SIZE is 2"),
        ({**DEEPSPEED, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2 but LOCAL_SIZE is 2"),
        ({**SLURM, "SLURM_LOCALID": "3"}, "SLURM_LOCALID is 3 but SLURM_STEP_TASKS_PER_NODE is 3"),
        ({**HAND, "LOCAL_RANK": "4"}, "LOCAL_RANK is 4 but WORLD_SIZE is 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3 but WORLD_SIZE is 2"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(2x)"}, "SLURM_STEP_TASKS_PER_NODE is '4(2x)'"),
        ({**SLURM, "RANK": "8", "WORLD_SIZE": "11"}, "RANK is 8 but SLURM_PROCID is 9 (SLURM)"),
        ({**SLURM, "RANK": "9", "WORLD_SIZE": "12"}, "WORLD_SIZE is 12 but SLURM_STEP_NUM_TASKS is 11 (SLURM)"),
        # a RANK of the shell that was sent to every process
        ({**OPENMPI, "RANK": "0", "WORLD_SIZE": "2"}, "RANK is 0 but OMPI_COMM_WORLD_RANK is 1 (OpenMPI)"),
        ({**OPENMPI, **MPICH, "PMI_RANK": "0"}, "OMPI_COMM_WORLD_RANK is 1 but PMI_RANK is 0 (MPICH)"),
        ({**SLURM, "PMI_RANK": "0", "PMI_SIZE": "11"}, "PMI_RANK is 0 but SLURM_PROCID is 9 (SLURM)"),
        ({**HAND, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a whole number"),
        ({**SLURM, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a whole number"),
        ({**HAND, "MASTER_PORT": "65536"}, "MASTER_PORT is 65536; a port is a number from 1 to 65535"),
    ],
)
def test_contradictions_are_refused_by_name(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        World.from_env(env)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_made_world_must_fit_too() -> None:
    with pytest.raises(ConfigError, match="rank 2 does not fit a world of 2"):
        World(2, 2)


def test_where_ranks_meet() -> None:
    slurm = World(1, 2, 0, "SLURM")
    env = {"SLURM_STEP_NODELIST": "n[01-02]", "SLURM_JOB_ID": "30007", "SLURM_STEP_ID": "2"}
    assert slurm.rendezvous(env) == ("n01", 20_000 + (30_007 * 101 + 2) % 12_000)
    assert slurm.rendezvous({**env, "MASTER_PORT": "5"}) == ("n01", 5)
    assert slurm.rendezvous({**env, "MASTER_ADDR": "h"}) == ("h", 20_000 + (30_007 * 101 + 2) % 12_000)
    neighbours = [
        {**env, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(90) for step in range(9)
    ]
    assert len({slurm.rendezvous(one) for one in neighbours}) == 90 * 9
    assert World(0, 2).rendezvous({"MASTER_ADDR": "h", "MASTER_PORT": "5"}) == ("h", 5)
    with pytest.raises(ConfigError, match=quoted("MASTER_PORT is not set")):
        World(0, 2, 0, "MPICH").rendezvous({"MASTER_ADDR": "h"})
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        slurm.rendezvous({"SLURM_JOB_ID": "7"})
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST is 'n\[1'"):
        slurm.rendezvous({**env, "SLURM_STEP_NODELIST": "n[1"})


def test_the_gpu_of_a_rank() -> None:
    assert World(3, 4, 1, "hand", 2).device_index(2) == 1
    assert World(3, 4, 1, "SLURM", 2, has_own_devices=True).device_index(1) == 0
    with pytest.raises(ConfigError, match="local rank 1 has no GPU: this process sees 1"):
        World(3, 4, 1, "hand", 2).device_index(1)
    with pytest.raises(ConfigError, match="this process sees 0"):
        World(3, 4, 1, "SLURM", 2, has_own_devices=True).device_index(0)


PROGRAMS = {
    "OpenMPI": ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n", "2"],
    "MPICH": ["mpiexec.hydra", "-n", "2"],
    "mellow-ds launch": [sys.executable, "-m", "mellow_ds.cli.main", "launch", "--num-per-host", "2", "--"],
}


@pytest.mark.parametrize("launcher", PROGRAMS)
def test_the_real_program(launcher: str, tmp_path: Path) -> None:
    """torchrun and deepspeed, which import torch, are met by the tests of whole runs."""
    program = PROGRAMS[launcher]
    if shutil.which(program[0]) is None:
        pytest.skip(f"{program[0]} is not installed (Debian: openmpi-bin, mpich)")
    script = tmp_path / "show.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom mellow_ds.world import World\nw = World.from_env()\n"
        "print('place', w.rank, w.size, w.local_rank, w.local_size, w.launcher)\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*program, sys.executable, str(script)], env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    places = sorted(line.partition("place ")[2] for line in done.stdout.splitlines())
    assert places == [f"{rank} 2 {rank} 2 {launcher}" for rank in (0, 1)]
