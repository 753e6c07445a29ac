"""Hosts on one machine: network namespaces with an ssh server each, on a network that nothing else is on.

`front` holds the bridge and is where launchers start; `node1` and `node2` are what they start ranks on. The hosts share
the file system and see one another's processes in /proc, but no address of this machine's own network.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

FRONT = "front"
NODES = ("node1", "node2")
INTERFACE = "e0"  # of every host
_ADDRESSES = {FRONT: "10.77.0.254", "node1": "10.77.0.1", "node2": "10.77.0.2"}
_TOOLS = ("ip", "ssh", "ssh-keygen", "sshd")
_UP_SECONDS = 20


def why_not() -> str:
    """Why hosts cannot be made here; empty: they can."""
    missing = [name for name in _TOOLS if _tool(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, openssh-client, openssh-server)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"mellow-probe-{os.getpid()}"
    made = subprocess.run([_path("ip"), "netns", "add", probe], capture_output=True, text=True)
    entered = subprocess.run([_path("ip"), "netns", "exec", probe, "true"], capture_output=True, text=True)
    subprocess.run([_path("ip"), "netns", "del", probe], capture_output=True)
    if made.returncode or entered.returncode:
        return f"network namespaces cannot be made here: {(made.stderr or entered.stderr).strip()}"
    return ""


class Hosts:
    """The hosts while they are up."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for keys, configuration and logs."""
        self.folder = folder
        self.ssh_config = folder / "ssh_config"
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in NODES))
        self._servers: list[subprocess.Popen[bytes]] = []

    def _namespace(self, host: str) -> str:
        return f"mellow-{os.getpid()}-{host}"

    def up(self) -> None:
        """Make namespaces, network, keys and servers."""
        self._write_keys()
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in (FRONT, *NODES):
            own = Path("/etc/netns") / self._namespace(host)
            own.mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in _ADDRESSES.items())]
            (own / "hosts").write_text("\n".join(lines) + "\n")
            (own / "nsswitch.conf").write_text("hosts: files\n")
            _ip("netns", "add", self._namespace(host))
            self._ip_on(host, "link", "set", "lo", "up")
        self._ip_on(FRONT, "link", "add", INTERFACE, "type", "bridge")
        self._ip_on(FRONT, "addr", "add", f"{_ADDRESSES[FRONT]}/24", "dev", INTERFACE)
        self._ip_on(FRONT, "link", "set", INTERFACE, "up")
        for host in NODES:
            self._link(host)
            self.serve(host)
        for host in NODES:
            self._wait_until_reached(host)

    def down(self) -> None:
        """End every process of the hosts and take all away."""
        for host in (FRONT, *NODES):
            for pid in self.pids(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for server in self._servers:
            server.kill()
            server.wait()
        for host in (*NODES, FRONT):
            subprocess.run([_path("ip"), "netns", "del", self._namespace(host)], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / self._namespace(host), ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()  # where nobody else has one

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on a host."""
        return [_path("ip"), "netns", "exec", self._namespace(host), *command]

    def pids(self, host: str) -> set[int]:
        """All processes of a host, its ssh server among them."""
        listed = subprocess.run([_path("ip"), "netns", "pids", self._namespace(host)], capture_output=True, text=True)
        return {int(word) for word in listed.stdout.split() if is_alive(int(word))}

    def mount(self, host: str, *words: str) -> None:
        """`mount WORDS`, seen by this host alone: by its ssh server, and by what comes in through that."""
        server = self._servers[NODES.index(host)]  # `ip netns exec` has given it a mount namespace of its own
        done = subprocess.run(
            ["nsenter", f"--target={server.pid}", "--mount", "--", "mount", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, f"mount {' '.join(words)}: {done.stderr}"

    def cut(self, host: str) -> None:
        """Take the host's link down; what runs there goes on."""
        self._ip_on(host, "link", "set", INTERFACE, "down")

    def power_off(self, host: str) -> None:
        """Remove its link, and kill all of its processes at once."""
        self._ip_on(FRONT, "link", "del", f"to-{host}")
        for pid in self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def power_on(self, host: str) -> None:
        """Bring back a host that was powered off; its private mounts are gone."""
        self._link(host)
        self.serve(host)
        self._servers[NODES.index(host)].wait()
        self._servers[NODES.index(host)] = self._servers.pop()
        self._wait_until_reached(host)

    def _link(self, host: str) -> None:
        self._ip_on(FRONT, "link", "add", f"to-{host}", "type", "veth",
                    "peer", "name", INTERFACE, "netns", self._namespace(host))  # fmt: skip
        self._ip_on(FRONT, "link", "set", f"to-{host}", "master", INTERFACE, "up")
        self._ip_on(host, "addr", "add", f"{_ADDRESSES[host]}/24", "dev", INTERFACE)
        self._ip_on(host, "link", "set", INTERFACE, "up")

    def _wait_until_reached(self, host: str) -> None:
        reach = self.on(FRONT, ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", host, "true"])
        wait_for(lambda: subprocess.run(reach, capture_output=True).returncode == 0, _UP_SECONDS)

    def know(self, host: str, key: Path) -> None:
        """Have the front know `key` as the host's."""
        known = self.folder / "known_hosts"
        others = [line for line in known.read_text().splitlines() if not line.startswith(f"{host} ")]
        known.write_text("\n".join([*others, f"{host} {key.with_suffix('.pub').read_text().strip()}"]) + "\n")

    def let_ssh_reach_nodes(self) -> None:
        """Make the configuration that of each host's /etc/ssh, so that `ssh node1` does with no option."""
        for host in (FRONT, *NODES):
            folder = Path("/etc/netns") / self._namespace(host) / "ssh"
            folder.mkdir(exist_ok=True)
            shutil.copy(self.ssh_config, folder / "ssh_config")

    def new_key(self, name: str) -> Path:
        """A key pair of its own."""
        path = self.folder / name
        subprocess.run([_path("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        return path

    def _write_keys(self) -> None:
        key, host_key = self.new_key("key"), self.new_key("host_key")
        (self.folder / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
        (self.folder / "known_hosts").touch()
        for host in NODES:
            self.know(host, host_key)
        self.ssh_config.write_text(
            f"IdentityFile {key}\nUserKnownHostsFile {self.folder / 'known_hosts'}\nGlobalKnownHostsFile /dev/null\n"
            "StrictHostKeyChecking yes\nCheckHostIP no\n"
        )

    def serve(self, host: str, port: int = 22, *more: str) -> None:
        """Start an ssh server there; `more`: options of it, as NAME=VALUE."""
        options = [
            *more,
            f"ListenAddress={_ADDRESSES[host]}", f"AuthorizedKeysFile={self.folder / 'authorized_keys'}",
            "PidFile=none", "StrictModes=no", "PermitRootLogin=yes", "UsePAM=no",
        ]  # fmt: skip
        words = [word for option in options for word in ("-o", option)]
        server = [_path("sshd"), "-D", "-f", "/dev/null", "-h", str(self.folder / "host_key"), "-p", str(port)]
        log = ["-E", str(self.folder / f"sshd-{host}-{port}.log")]
        self._servers.append(subprocess.Popen(self.on(host, [*server, *log, *words]), stdin=subprocess.DEVNULL))

    def _ip_on(self, host: str, *words: str) -> None:
        _ip("-n", self._namespace(host), *words)


@contextlib.contextmanager
def hosts_up(folder: Path) -> Iterator[Hosts]:
    """Hosts for as long as the context lasts; nothing of them stays."""
    hosts = Hosts(folder)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


def is_alive(pid: int) -> bool:
    """Whether a process runs: it is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_for(found: Callable[[], object], seconds: float, what: object = "") -> None:
    """Return when `found()` is true; fail where it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"what was waited for did not come in {seconds} s: {what}"
        time.sleep(0.1)


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _path(name: str) -> str:
    path = _tool(name)
    assert path is not None, name
    return path


def _ip(*words: str) -> None:
    done = subprocess.run([_path("ip"), *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
