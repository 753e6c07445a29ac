"""Where a process stands: the stack traces of all its threads, and the innermost lines of its main thread."""

import faulthandler
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

_NUM_OWN, _NUM_INNERMOST = 2, 3  # frames of the main thread in a message: of our own code, and of any
_PACKAGE = str(Path(__file__).resolve().parent.parent)
# a main thread whose innermost frame is in one of these waits for other ranks
_COLLECTIVE_FILES = ("torch/distributed/", "deepspeed/comm/")


def stacks_name(rank: int) -> str:
    """File name of a rank's stack traces."""
    return f"rank-{rank:05d}.stacks.txt"


def dump_stacks(path: Path) -> None:
    """Write the stacks of all threads; raises `OSError`."""
    with path.open("wb") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def main_thread_lines() -> list[str]:
    """The innermost calls of the main thread, of our own code and of any, outermost of them first, one line each."""
    frame = _main_frame()
    if frame is None:
        return []
    frames = list(enumerate(traceback.extract_stack(frame)))
    own = [number for number, call in frames if call.filename.startswith(_PACKAGE)]
    shown = {*own[-_NUM_OWN:], *range(len(frames) - _NUM_INNERMOST, len(frames))}
    return [f"{call.filename}:{call.lineno} in {call.name}: {call.line}" for number, call in frames if number in shown]


def main_thread_place() -> str:
    """The innermost call of the main thread in our own code (or, where there is none, in any), short."""
    innermost = frame = _main_frame()
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"


def waits_in_collective() -> bool:
    """Whether the main thread waits for other ranks, as far as its innermost frame tells."""
    frame = _main_frame()
    name = frame.f_code.co_filename.replace("\\", "/") if frame is not None else ""
    return any(part in name for part in _COLLECTIVE_FILES)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)
