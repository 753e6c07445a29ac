"""Who this process is among the processes of a run: read once from the environment, passed on from then.

Nothing else in the project reads RANK, SLURM_* or OMPI_*, or asks the process group who it is.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mellow_ds.errors import ConfigError

# launcher -> names of (rank, world size, local rank) that it sets
_LAUNCHER_VARIABLES = {
    "torchrun or deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
# of torchrun, DeepSpeed, OpenMPI, MPICH; where none is set, all processes are taken to be on this host
_LOCAL_SIZE_VARIABLES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class World:
    """One process's place in the run."""

    rank: int = 0  # 0 .. size - 1, over all hosts
    size: int = 1  # processes of the run
    local_rank: int = 0  # 0 .. processes of this host - 1; picks the GPU
    launcher: str = "none"  # who set the variables, for messages
    local_size: int = 1  # processes of the run on this host

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(
                f"rank {self.rank} does not fit a world of {self.size} processes (set by {self.launcher})"
            )

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes, prints and records."""
        return self.rank == 0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "World":
        """The world that the launcher described; a world of one where no launcher did.

        torchrun's and DeepSpeed's variables come first: under `srun torchrun` both they and SLURM's are set, and
        only they count processes. Inside an `salloc` shell SLURM_PROCID is set for the shell itself, with
        SLURM_STEP_ID absent: that is no rank.
        """
        env = os.environ if environ is None else environ
        for launcher, (rank_name, size_name, local_name) in _LAUNCHER_VARIABLES.items():
            if launcher == "SLURM" and "SLURM_STEP_ID" not in env:
                continue
            found = [name for name in (rank_name, size_name) if name in env]
            if not found:
                continue
            if len(found) == 1:
                missing = size_name if found[0] == rank_name else rank_name
                raise ConfigError(f"{found[0]} is set but {missing} is not: set both, or neither for a single process")
            local_rank = _int(env, local_name) if local_name in env else 0
            rank, size = _int(env, rank_name), _int(env, size_name)
            local_size = next((_int(env, name) for name in _LOCAL_SIZE_VARIABLES if name in env), size)
            return cls(rank, size, local_rank, launcher, local_size)
        return cls()

    def rendezvous(self, environ: Mapping[str, str]) -> tuple[str, int]:
        """(address, port) where the ranks meet: MASTER_ADDR and MASTER_PORT, or the first node of a SLURM step."""
        if self.launcher == "SLURM" and "MASTER_ADDR" not in environ:
            # the port follows from the job, so that all ranks agree on it and two jobs of a node do not
            port = 20_000 + _int(environ, "SLURM_JOB_ID") % 20_000
            return first_host(environ["SLURM_STEP_NODELIST"]), int(environ.get("MASTER_PORT", port))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise ConfigError(
                f"the run has {self.size} processes (set by {self.launcher}) but {missing[0]} is not set: start with "
                "deepspeed, torchrun or srun, or set MASTER_ADDR and MASTER_PORT to a host and a free port of rank 0"
            )
        return environ["MASTER_ADDR"], _int(environ, "MASTER_PORT")


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list such as `gpu[003-005,9],login1`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", node_list)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is '{node_list}', not a list of hosts")
    return match.group(1) + (match.group(2) or "")


def _int(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"environment variable {name} is '{env[name]}', not a whole number") from None
