"""Runs a command that ends when who started it is gone, even by SIGKILL.

    python -I launch/tied.py [--code FILE] COMMAND [ARGUMENT ...]

`--code`: the command is a child, tied in its turn, and its exit code (128 and the signal where one ended it) is written
into FILE; without it this process becomes the command. Standard library only; where there is no Linux nothing is tied.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def tie() -> None:
    """Have the kernel end this process with its parent."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def main(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    tie()
    if words[0] != "--code":
        os.execvp(words[0], words)
    file, command = words[1], words[2:]
    with subprocess.Popen(command, preexec_fn=tie) as process:
        code = process.wait()
    code = code if code >= 0 else 128 - code
    Path(file).write_text(f"{code}\n", encoding="ascii")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
