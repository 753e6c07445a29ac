"""What NCCL says about the network that it took: its log goes into a file meanwhile, and is read from there."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"NCCL (INFO|WARN) ?(.*)")
_NETWORK = re.compile(r"Using network (.+)")
_DEVICES = re.compile(r"NET/([A-Za-z]+) ?: Using (.+)")


@dataclass(frozen=True)
class NcclLog:
    """What is in a log."""

    network: str = ""  # such as "Socket" or "IB"
    devices: str = ""  # as NCCL lists them, such as "[0]eth0:10.0.0.1<0>"
    warnings: tuple[str, ...] = ()


def start_nccl_log(folder: Path) -> Path:
    """Have NCCL write into a file of this process there; call before the process group is made. What a user has asked
    of NCCL's log stands."""
    file = folder / f"nccl-{os.getpid()}.log"
    if os.environ.get("NCCL_DEBUG", "WARN").upper() in ("WARN", "VERSION") and "NCCL_DEBUG_FILE" not in os.environ:
        os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET", NCCL_DEBUG_FILE=str(file))
    return file


def read_nccl_log(file: Path) -> NcclLog:
    """Of a file that may not be there."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return NcclLog()
    network, devices, warnings = "", "", []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        if match[1] == "WARN":
            warnings.append(match[2].strip())
        elif found := _NETWORK.search(match[2]):
            network = found[1].strip()
        elif found := _DEVICES.search(match[2]):
            devices = found[2].strip()
    return NcclLog(network, devices, tuple(warnings))
