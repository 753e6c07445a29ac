"""Fixtures that tests of all rooms share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder beside a checkout with parity arrays and real speech; the suite stands without it."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared (parity arrays, real speech) is not beside this checkout")
    return folder
