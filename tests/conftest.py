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
    """Take back what a command did to the project's logger that ran in this process, here or in a fixture of a module:
    pytest captures twice from a logger that does not propagate."""
    _make_plain(logging.getLogger("mellow_ds"))
    yield
    _make_plain(logging.getLogger("mellow_ds"))


def _make_plain(logger: logging.Logger) -> None:
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
