"""Memory that is used up is said in one line; other errors stay what they are."""

import pytest
import torch

from mellow_ds.engine.memory import naming_memory
from mellow_ds.errors import FaultError


def test_a_host_without_memory() -> None:
    """For real: no machine has so much."""
    said = r"^this host has no memory left \(.*you tried to allocate \d+ bytes"
    with pytest.raises(FaultError, match=said) as fault, naming_memory():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "take a smaller train.batch_size" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), naming_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)
