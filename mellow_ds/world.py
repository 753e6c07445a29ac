"""Who this process is among the processes of a run: read once from the environment, passed on from then.

Nothing else in the project reads RANK, SLURM_* or OMPI_*, or asks the process group who it is.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mellow_ds.errors import ConfigError
from mellow_ds.node_list import expand_counts, expand_node_list

# launchers that hand out RANK, by a variable that only they set; an inner one (`srun torchrun`) comes before an outer
_MARKS = {"torchrun": "TORCHELASTIC_RUN_ID", "deepspeed": "CROSS_RANK", "mellow-ds launch": "MELLOW_LAUNCH_ID"}
BY_HAND = "hand"  # RANK and WORLD_SIZE, and nobody who says so
SLURM, OPENMPI, MPICH = "SLURM", "OpenMPI", "MPICH"
# job steps that are no ranks have numbers above it: the batch script, the shell of salloc (slurm.h)
_LAST_STEP_ID = 0xFFFFFFF0
# of the meeting, where SLURM's job gives it: below what systems hand out by themselves (from 32768 on Linux)
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
_STEPS_OF_JOB = 101  # ports between two jobs; shares no factor with their number


@dataclass(frozen=True)
class World:
    """One process's place in the run."""

    rank: int = 0  # 0 .. size - 1, over all hosts
    size: int = 1  # processes of the run
    local_rank: int = 0  # 0 .. processes of this host - 1; picks the GPU
    launcher: str = "none"  # who set the variables, for messages
    local_size: int = 1  # processes of the run on this host
    launch_id: str = ""  # of `mellow-ds launch`, the same for each of its attempts; empty by others
    has_own_devices: bool = False  # the launcher lets each rank see its own GPUs only

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

        RANK and WORLD_SIZE come first: under `srun torchrun` torchrun's and SLURM's variables are set, and only the
        former count processes. Set by hand they must agree with those of a launcher. MPI's come before SLURM's, which
        under `mpirun` tell of the helpers that mpirun starts, one a node. Raises `ConfigError` naming the variables
        that contradict one another.
        """
        env = os.environ if environ is None else environ
        outer = _outer_place(env)
        place = _plain_place(env, outer) or outer
        if place is None:
            return cls()
        _check(place, env)
        return cls(
            place.rank.number, place.size.number, place.local_rank.number, place.launcher, place.local_size.number,
            env.get(_MARKS["mellow-ds launch"], "") if place.launcher == "mellow-ds launch" else "",
            place.launcher == SLURM and _binds_gpus_to_tasks(env),
        )  # fmt: skip

    def rendezvous(self, environ: Mapping[str, str]) -> tuple[str, int]:
        """(address, port) where the ranks meet: MASTER_ADDR and MASTER_PORT, or the first node of a SLURM step."""
        if self.launcher == SLURM:
            # the port follows from job and step, so that all ranks agree on it, and jobs of one node hardly ever do
            job, step = (_int(environ, name) if name in environ else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
            port = _FIRST_PORT + (job * _STEPS_OF_JOB + step) % _NUM_PORTS
            name = "SLURM_STEP_NODELIST"
            if "MASTER_ADDR" in environ or name in environ:
                address = environ.get("MASTER_ADDR") or expand_node_list(environ[name], name)[0]
                return address, _port(environ) if "MASTER_PORT" in environ else port
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise ConfigError(
                f"the run has {self.size} processes (set by {self.launcher}) but {missing[0]} is not set: start with "
                "deepspeed, torchrun or srun, or set MASTER_ADDR and MASTER_PORT to a host and a free port of rank 0"
            )
        return environ["MASTER_ADDR"], _port(environ)

    def device_index(self, num_devices: int) -> int:
        """Which of the `num_devices` GPUs that this process sees is its own; raises `ConfigError` where none is."""
        if self.local_rank < num_devices:
            return self.local_rank
        if self.has_own_devices and num_devices:
            return 0
        raise ConfigError(
            f"local rank {self.local_rank} has no GPU: this process sees {num_devices}; start at most one process a "
            "GPU, and look at CUDA_VISIBLE_DEVICES"
        )


@dataclass(frozen=True)
class _Value:
    """A number and the variable that says it; without a name: nobody does."""

    number: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name} is {self.number}"


@dataclass(frozen=True)
class _Place:
    """What one launcher says of this process."""

    launcher: str
    rank: _Value
    size: _Value
    local_rank: _Value
    local_size: _Value  # without a name: all processes are taken to be on this host


def _plain_place(env: Mapping[str, str], outer: _Place | None) -> _Place | None:
    """By RANK and WORLD_SIZE; None where they are not set."""
    if "RANK" not in env:
        # scripts of SLURM jobs often export WORLD_SIZE with the port and the address
        if "WORLD_SIZE" in env and (outer is None or outer.size.number != _int(env, "WORLD_SIZE")):
            against = f", and {outer.size}" if outer else ""
            raise ConfigError(
                f"WORLD_SIZE is set but RANK is not{against}: set both, or neither for a single process or where a "
                "launcher counts"
            )
        return None
    if "WORLD_SIZE" not in env:
        raise ConfigError("RANK is set but WORLD_SIZE is not: set both, or neither for a single process")
    launcher = next((name for name, mark in _MARKS.items() if mark in env), BY_HAND)
    place = _read(env, launcher, "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    if launcher == BY_HAND:
        _compare(place, outer)
    return place


def _outer_place(env: Mapping[str, str]) -> _Place | None:
    """By the variables of MPI or SLURM; None where no process was started by them."""
    openmpi = mpich = slurm = None
    if "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env:
        openmpi = _read(
            env, OPENMPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",),
            ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        )  # fmt: skip
    if "PMI_RANK" in env or "PMI_SIZE" in env:
        mpich = _read(
            env, MPICH, "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
            ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        )  # fmt: skip
    if openmpi is not None:
        _compare(openmpi, mpich)
        return openmpi
    if "SLURM_STEP_ID" in env and _int(env, "SLURM_STEP_ID") < _LAST_STEP_ID and "SLURM_PROCID" in env:
        slurm = _slurm_place(env)
    if mpich is not None and slurm is not None and not mpich.local_rank.name:
        _compare(mpich, slurm)  # `srun --mpi=pmi2`: both are SLURM's
        return slurm
    return mpich or slurm


def _slurm_place(env: Mapping[str, str]) -> _Place:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    place = _read(env, SLURM, "SLURM_PROCID", size_name, ("SLURM_LOCALID",), ())
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in env and "SLURM_NODEID" in env:
            counts, node = expand_counts(env[name], name), _int(env, "SLURM_NODEID")
            # of the whole job, where the step has no variable of its own, it may be about more tasks than the step has
            if 0 <= node < len(counts) and sum(counts) == place.size.number:
                return _Place(SLURM, place.rank, place.size, place.local_rank, _Value(counts[node], name))
    return place


def _read(
    env: Mapping[str, str], launcher: str, rank: str, size: str, local_ranks: tuple[str, ...],
    local_sizes: tuple[str, ...],
) -> _Place:  # fmt: skip
    """A place by the names of its variables; the first that is set of those that may be missing."""
    for name, other in ((rank, size), (size, rank)):
        if name not in env:
            raise ConfigError(f"{other} is set but {name} is not: was it {launcher} that started this process?")
    found = _Value(_int(env, size), size)
    local_rank = next((_Value(_int(env, name), name) for name in local_ranks if name in env), _Value(0))
    local_size = next((_Value(_int(env, name), name) for name in local_sizes if name in env), _Value(found.number))
    return _Place(launcher, _Value(_int(env, rank), rank), found, local_rank, local_size)


def _compare(inner: _Place, outer: _Place | None) -> None:
    """Refuse two launchers that count differently: which one is meant cannot be known."""
    if outer is None:
        return
    for one, other in ((inner.rank, outer.rank), (inner.size, outer.size)):
        if one.number != other.number:
            raise ConfigError(
                f"{one} but {other} ({outer.launcher}): the two contradict each other; unset {inner.rank.name} and "
                f"{inner.size.name}, or unset {outer.rank.name} where a script of yours counts the ranks"
            )


def _check(place: _Place, env: Mapping[str, str]) -> None:
    """Refuse numbers that cannot be together."""
    rank, size, local_rank, local_size = place.rank, place.size, place.local_rank, place.local_size
    if size.number < 1:
        raise ConfigError(f"{size}: a run has at least one process")
    if not 0 <= rank.number < size.number:
        raise ConfigError(f"{rank} but {size}: ranks count from 0 to {size.number - 1}")
    if local_size.name and not 1 <= local_size.number <= size.number:
        raise ConfigError(f"{local_size} but {size}: a host has at least one process and at most all of them")
    if not 0 <= local_rank.number < local_size.number:
        against = str(local_size) if local_size.name else str(size)
        raise ConfigError(f"{local_rank} but {against}: local ranks count from 0 on each host")
    if size.number > 1 and "MASTER_PORT" in env:
        _port(env)


def _binds_gpus_to_tasks(env: Mapping[str, str]) -> bool:
    """Whether `srun` was asked to show each task GPUs of its own only."""
    bind = env.get("SLURM_GPU_BIND", "").removeprefix("quiet,").removeprefix("verbose,")
    return (
        "SLURM_GPUS_PER_TASK" in env
        or "gpu" in env.get("SLURM_TRES_PER_TASK", "")
        or bind.startswith(("per_task", "single"))
    )


def _port(env: Mapping[str, str]) -> int:
    port = _int(env, "MASTER_PORT")
    if not 0 < port < 65_536:
        raise ConfigError(f"environment variable MASTER_PORT is {port}; a port is a number from 1 to 65535")
    return port


def _int(env: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", env[name]):
        raise ConfigError(f"environment variable {name} is '{env[name]}', not a whole number")
    return int(env[name])
