"""Which rank runs where, and what command and variables each host gets: a pure function of hosts and options."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from mellow_ds.errors import ConfigError
from mellow_ds.launcher.environment import Travelling
from mellow_ds.launcher.hostfile import Host

DEFAULT_PORT = 29500  # torch's and DeepSpeed's own
ANY_PORT = 0  # one that is free on the first host
LOCAL_NAMES = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class HostPlan:
    """A host's share: the ranks first_rank .. first_rank + num_ranks - 1."""

    name: str
    first_rank: int
    num_ranks: int
    devices: tuple[int, ...] = ()  # the GPUs that its ranks see; empty: all

    @property
    def ranks(self) -> range:
        """Numbers of its ranks; a rank's local rank is its place among them."""
        return range(self.first_rank, self.first_rank + self.num_ranks)


@dataclass(frozen=True)
class LaunchPlan:
    """All that is decided before a host is spoken to."""

    hosts: tuple[HostPlan, ...]
    command: tuple[str, ...]  # of a rank, the same for all
    folder: str  # where each rank runs, on every host
    travelling: Travelling = field(default_factory=lambda: Travelling({}, {}))
    master_address: str = "127.0.0.1"  # where the ranks meet: of the first host
    master_port: int = DEFAULT_PORT
    is_port_fixed: bool = False  # asked for: where it is taken the run is refused, else a free one is used
    interface: str = ""  # the network interface of collectives, on every host
    env_file: str = ""  # a shell file that each host sources first
    interpreter: str = "python"
    launch_id: str = ""  # of this call of the launcher, the same in all of its attempts
    min_hosts: int = 0  # that a restart after a lost host takes
    max_restarts: int = 0  # of that kind

    @property
    def num_ranks(self) -> int:
        """Of all hosts."""
        return sum(host.num_ranks for host in self.hosts)

    def host_of(self, rank: int) -> HostPlan:
        """The host that a rank runs on."""
        return next(host for host in self.hosts if rank in host.ranks)

    def label(self, rank: int) -> str:
        """How a rank is called in messages: with its host where there are several."""
        return f"rank {rank}" if len(self.hosts) == 1 else f"rank {rank} on host {self.host_of(rank).name}"

    def interfaces(self) -> dict[str, str]:
        """Variables that bind collectives to `interface`."""
        return {f"{library}_SOCKET_IFNAME": self.interface for library in ("GLOO", "NCCL")} if self.interface else {}

    def variables(self, rank: int, port: int) -> dict[str, str]:
        """What tells a rank who it is."""
        host = self.host_of(rank)
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank - host.first_rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_WORLD_SIZE": str(host.num_ranks),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(port),
            "MELLOW_LAUNCH_ID": self.launch_id,
        }
        devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))} if host.devices else {}
        return {**place, **devices}


def place_ranks(hosts: Sequence[Host]) -> tuple[HostPlan, ...]:
    """The ranks of each host, counted through in the order of the hosts."""
    placed, first = [], 0
    for host in hosts:
        placed.append(HostPlan(host.name, first, len(host.slots), host.slots if host.is_narrowed else ()))
        first += len(host.slots)
    return tuple(placed)


def narrowed(plan: LaunchPlan, names: Collection[str]) -> LaunchPlan:
    """The plan on the hosts of these names only: ranks counted through anew, the first host and a port of its own."""
    hosts, first = [], 0
    for host in plan.hosts:
        if host.name in names:
            hosts.append(replace(host, first_rank=first))
            first += host.num_ranks
    address = plan.master_address if hosts[0].name == plan.hosts[0].name else hosts[0].name
    return replace(plan, hosts=tuple(hosts), master_address=address, is_port_fixed=False)


def choose_master(hosts: Sequence[Host], given: str = "") -> str:
    """The address where the ranks meet: the one given, or the first host's name."""
    if given:
        return given
    first = hosts[0].name
    if first not in LOCAL_NAMES:
        return first
    if len(hosts) > 1:
        raise ConfigError(
            f"the first host is {first}, which means another one on each host: name it as the others see it, or give "
            "--master-addr"
        )
    return "127.0.0.1"


def rank_command(words: Sequence[str], interpreter: str) -> tuple[str, ...]:
    """The command line of a rank: a Python script gets the interpreter before it, anything else is taken as it is."""
    if not words:
        raise ConfigError("no command is given: end with `-- train.py --config ...`")
    return (interpreter, *words) if words[0].endswith(".py") else tuple(words)
