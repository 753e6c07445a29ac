"""A save that failed, in words: what, where, how much room it takes and how much there is."""

import errno
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from mellow_ds.errors import MellowError


def reason_of(error: Exception) -> str:
    """One line about what kept a file from being written."""
    if isinstance(error, MellowError):
        return str(error)
    code = error.errno if isinstance(error, OSError) else _code_in(error)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: make room, or set save_dir to another disk"
    if code == errno.EROFS:
        return "the file system is read-only: set save_dir to another one"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is gone: save_dir must be one folder that all hosts see, and nobody may remove it"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    text = (str(error).strip() or "no more is known").splitlines()[0]
    return f"{type(error).__name__}: {text}"


def room(folder: Path, num_bytes: int) -> str:
    """How much room the save takes and how much there is, now that what was begun is removed."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return f"it takes {_megabytes(num_bytes)}"
    return f"it takes {_megabytes(num_bytes)}, {_megabytes(free)} are free"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 10e6 else f"{num_bytes / 1e6:.2f} MB"


def _code_in(error: Exception) -> int:
    # safetensors puts the operating system's error into its text: `No space left on device (os error 28)`
    found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found.group(1)) if found else 0
