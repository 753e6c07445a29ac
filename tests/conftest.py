"""Fixtures that tests of all rooms share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder beside a checkout with parity arrays and real speech; the suite stands without it."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared (parity arrays, real speech) is not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def _plain_logging() -> Iterator[None]:
    """Give back the project's logger as it was: a command that ran in this process has set it up for itself."""
    logger = logging.getLogger("mellow_ds")
    before = (list(logger.handlers), logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
