"""Ranks from the variables of each launcher."""

import pytest

from mellow_ds.errors import ConfigError
from mellow_ds.world import World, first_host


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, World(3, 4, 1, "torchrun or deepspeed", 4)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            World(3, 4, 1, "torchrun or deepspeed", 2),
        ),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"},
            World(1, 2, 0, "SLURM", 2),
        ),
        # an salloc shell is no rank
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, World()),
        # under srun torchrun only torchrun counts processes
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_ID": "0",
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
            },
            World(3, 4, 1, "torchrun or deepspeed", 4),
        ),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, World(1, 2, 0, "OpenMPI", 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, World(1, 2, 1, "MPICH", 2)),
    ],
)
def test_each_launcher_is_read(env: dict[str, str], world: World) -> None:
    assert World.from_env(env) == world


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 does not fit a world of 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a whole number"),
    ],
)
def test_contradictions_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        World.from_env(env)


@pytest.mark.parametrize(
    ("nodes", "host"), [("n1", "n1"), ("gpu[003-005,9],login1", "gpu003"), ("a-b[7]", "a-b7"), ("x,y", "x")]
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_where_ranks_meet() -> None:
    slurm = World(1, 2, 0, "SLURM")
    env = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "30007"}
    assert slurm.rendezvous(env) == ("n1", 30007)
    assert World(0, 2).rendezvous({"MASTER_ADDR": "h", "MASTER_PORT": "5"}) == ("h", 5)
    with pytest.raises(ConfigError, match="MASTER_PORT is not set"):
        World(0, 2, 0, "MPICH").rendezvous({"MASTER_ADDR": "h"})
