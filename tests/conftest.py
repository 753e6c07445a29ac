"""Fixtures that tests of all rooms share."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# a suite that a shell started in the background, or by nohup, would hand this on to all that its tests start
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


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
