"""One clear log a run: rank 0 speaks and writes the run's file, the others are quiet below WARNING."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from mellow_ds.world import World

ALIKE = {"alike": True}  # `extra` of a warning that all ranks come to: rank 0 says it for them
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class _StderrAboveProgressBar(logging.Handler):
    """Writes through tqdm, so that a line does not cut a progress bar in two."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(world: World, file: Path | None = None) -> logging.Logger:
    """Configure and return the project's logger; `file` (rank 0 only) is appended to."""
    logger = logging.getLogger("mellow_ds")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if world.is_main else logging.WARNING)
    prefix = "" if world.is_main else f"[rank {world.rank}] "
    formatter = logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [_StderrAboveProgressBar()]
    if file is not None and world.is_main:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        if not world.is_main:
            handler.addFilter(lambda record: not getattr(record, "alike", False))
        logger.addHandler(handler)
    return logger


def append_to_log_file(text: str) -> None:
    """Lines for the run's file alone, where this rank has one: what stderr gets in a form of its own.

    Past the locks of logging, which another thread may hold for ever.
    """
    for handler in logging.getLogger("mellow_ds").handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            with contextlib.suppress(OSError):
                os.write(handler.stream.fileno(), f"{text}\n".encode(errors="backslashreplace"))
