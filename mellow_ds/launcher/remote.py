"""The command line that starts a host's agent: by ssh, or as it is on this host; and what ssh's words mean."""

import shlex
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

from mellow_ds.launcher.plan import LOCAL_NAMES, LaunchPlan

AGENT = "mellow_ds.launcher.agent"
_CONNECT_SECONDS = 10
_SSH_OPTIONS = {
    "BatchMode": "yes",  # never asks: there is nobody to answer
    "ConnectTimeout": str(_CONNECT_SECONDS),
    "ServerAliveInterval": "5",  # a host that is gone ends the connection after 15 s
    "ServerAliveCountMax": "3",
    "ControlMaster": "no",  # a shared connection would live and die with somebody else's
    "ControlPath": "none",
    "ForwardX11": "no",
    "LogLevel": "ERROR",
}
_RESOLVE_SECONDS = 0.4
# source the file ($1), then become what follows; what the file prints must not stand among the agent's answers
_SOURCE = '. "$1" >&2 </dev/null || exit; export PYTHONPATH="$2${PYTHONPATH:+:$PYTHONPATH}"; shift 2; exec "$@"'
# what ssh prints -> what it means and what to do
_SSH_ERRORS = {
    "Could not resolve hostname": "nobody knows this name: check its spelling, /etc/hosts and the ssh configuration",
    "Host key verification failed": "its host key is not the one known for it, or none is known: find out why, then "
    "set it right with ssh-keygen -R and one connection by hand",
    "Permission denied": "ssh has no key that it takes: put one there with ssh-copy-id, or name it in the ssh "
    "configuration",
    "Connection refused": "no ssh server listens there: start it, or name its port in the ssh configuration",
    "No route to host": "no way leads there: is it switched on, and on this network?",
    "Network is unreachable": "no way leads there: is it on this network?",
    "timed out": f"it does not answer (waited {_CONNECT_SECONDS} s): is it switched on, and on this network?",
}


def local_hosts(names: Iterable[str], seconds: float = _RESOLVE_SECONDS) -> frozenset[str]:
    """Those of `names` that mean this host and need no ssh; what is not known in `seconds` counts as another one."""
    found: set[str] = set()

    def ask(name: str) -> None:
        if _is_local(name):
            found.add(name)

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return frozenset(found)


def _is_local(name: str) -> bool:
    """Whether the name's address is one of this host: then the way to it begins at that address itself."""
    if name in (*LOCAL_NAMES, socket.gethostname()):
        return True
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                if probe.getsockname()[0] == address[0]:
                    return True
    except OSError:
        pass
    return False


def agent_command(plan: LaunchPlan, module: str = AGENT) -> list[str]:
    """What runs on a host: the agent, found in the clone or the installed package that this is."""
    root = str(Path(__file__).resolve().parent.parent.parent)
    agent = [plan.interpreter, "-m", module]
    if plan.env_file:
        return ["bash", "-c", _SOURCE, "mellow-ds", plan.env_file, root, *agent]
    return ["env", f"PYTHONPATH={root}", *agent]


def host_command(plan: LaunchPlan, host: str, is_local: bool, ssh_config: str = "", module: str = AGENT) -> list[str]:
    """What is started here for a host."""
    agent = agent_command(plan, module)
    if is_local:
        return agent
    options = [word for name, value in _SSH_OPTIONS.items() for word in ("-o", f"{name}={value}")]
    configuration = ["-F", ssh_config] if ssh_config else []
    # one word, read by the login shell of the host, whichever that is; `cd /`: Python imports from where it starts
    return ["ssh", "-T", *configuration, *options, "--", host, f"cd / && exec {shlex.join(agent)}"]


def explain(said: Iterable[str], code: int | None) -> str:
    """Why a host's agent did not come up, from the last lines that ssh or the host printed."""
    lines = [line.strip() for line in said if line.strip()]
    for line in reversed(lines):
        for words, meaning in _SSH_ERRORS.items():
            if words in line:
                return f"{meaning} ({line.removeprefix('ssh: ')})"
    last = f": {lines[-1]}" if lines else ""
    if code == 127:
        return f"its Python is not there: install it at the same place, or give --python or --env-file{last}"
    return f"the connection ended with code {code}{last}"
