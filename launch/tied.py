"""Runs a command that ends when who started it is gone, even by SIGKILL.

    python -I launch/tied.py [--code FILE | --lost FILE PID HOSTS] COMMAND [ARGUMENT ...]

`--code`: its exit code (128 and the signal where one ended it) is written into FILE. `--lost`: the command is an ssh to
one of HOSTS, joined by commas; where its connection breaks, the host's name is written into FILE, and PID gets SIGUSR2.
In both the command is a child, tied in its turn; else this process becomes it. Standard library only; where there is no
Linux nothing is tied.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_SSH_FAILED = 255  # of ssh itself; else it hands on the code of the command
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def tie() -> None:
    """Have the kernel end this process with its parent."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def run(command: list[str]) -> int:
    """Run the command as a child; returns its exit code."""
    with subprocess.Popen(command, preexec_fn=tie) as process:
        code = process.wait()
    return code if code >= 0 else 128 - code


def main(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    tie()
    if words[0] == "--code":
        code = run(words[2:])
        Path(words[1]).write_text(f"{code}\n", encoding="ascii")
        return code
    if words[0] == "--lost":
        file, pid, hosts, command = Path(words[1]), int(words[2]), words[3].split(","), words[4:]
        code = run(command)
        if code == _SSH_FAILED:
            file.write_text(next((word for word in command if word in hosts), "?") + "\n", encoding="utf-8")
            os.kill(pid, signal.SIGUSR2)
        return code
    return os.execvp(words[0], words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
