"""A compilation of DeepSpeed or torch extensions that was killed leaves a `lock` for which every later one waits.

torch takes it by creating the file and keeps it open while it compiles; whoever finds it waits until it is gone,
without a word and for ever (pytorch#189245). So a lock that no process has open is one that nobody will remove.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from mellow_ds.errors import ConfigError

_SETTLE_SECONDS = 3.0  # in which a lock that is being let go of goes away
# a compiler may be silent for so long; counts where the process that compiles cannot be seen from here
_LONGEST_COMPILATION_SECONDS = 1800.0
_SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "afs", "9p", "fuse", "wekafs", "gfs")


def check_extension_locks(root: Path | None = None) -> None:
    """Raise `ConfigError`, naming the file, where a stale lock would hang the compilation of an extension.

    Call where extensions are compiled on first use (on GPUs, or with DeepSpeed's CPU ops), before they are. `root`:
    the cache, as torch finds it where None. Takes no time without a lock, a few seconds with one.
    """
    root = extensions_root() if root is None else root
    found = _unattended(root)
    if not found:
        return
    time.sleep(_SETTLE_SECONDS)
    stale = sorted(found & _unattended(root))
    if stale:
        names = " ".join(map(str, stale))
        raise ConfigError(
            f"a compilation that was killed left its lock, and the next one would wait for it for ever: remove {names} "
            "(where no other host compiles just now), then start again"
        )


def extensions_root() -> Path:
    """The folder that torch compiles extensions in: TORCH_EXTENSIONS_DIR, else torch_extensions in the user's cache."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "torch_extensions"


def _unattended(root: Path) -> set[Path]:
    """Locks that nobody has open, as far as that can be seen."""
    # ROOT/NAME/lock, and ROOT/py311_cu128/NAME/lock where the folder is torch's own choice
    locks = [path.absolute() for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]
    if not locks:
        return set()
    open_files = set(_open_files())
    return {lock for lock in locks if not _is_attended(lock, open_files)}


def _is_attended(lock: Path, open_files: set[tuple[int, int]]) -> bool:
    try:
        found = lock.stat()
        if (found.st_dev, found.st_ino) in open_files:
            return True
        if os.geteuid() in (0, found.st_uid) and not _is_shared(lock):
            return False
        # another host's or user's process may hold it: a folder in which something changed lately is compiled in
        last_change = max(path.stat().st_mtime for path in lock.parent.iterdir())
    except (OSError, ValueError):
        return True  # it has just gone, or changes as we look
    return time.time() - last_change < _LONGEST_COMPILATION_SECONDS


def _open_files() -> Iterator[tuple[int, int]]:
    """(device, inode) of what the processes of this host have open, as far as this user may see."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            handles = list(folder.iterdir())
        except OSError:
            continue
        for handle in handles:
            try:
                if handle.readlink().name != "lock":
                    continue
                found = handle.stat()
            except OSError:
                continue
            yield found.st_dev, found.st_ino


def _is_shared(path: Path) -> bool:
    """Whether other hosts may see the file: by the kind of its file system (Linux)."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    best, kind = "", ""
    for line in mounts:
        # proc(5): mount point is field 5, the kind of file system follows the dash
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and Path(point) in (path, *path.parents):
            best, kind = point, rest.split()[0]
    return kind.startswith(_SHARED_FILE_SYSTEMS)
