"""Keeping the hub's client from the network: looking at a run fetches nothing, and waits for nobody."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "HF_HUB_OFFLINE"


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is fetched from a hub meanwhile, whether its client was imported before or is imported now."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    was_offline = getattr(constants, _VARIABLE, None)
    if constants is not None:
        setattr(constants, _VARIABLE, True)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
        if constants is None:
            constants = sys.modules.get("huggingface_hub.constants")
            was_offline = before in ("1", "ON", "YES", "TRUE")
        if constants is not None:
            setattr(constants, _VARIABLE, was_offline)
