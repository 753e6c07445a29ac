"""Fixtures of the data room's tests."""

from pathlib import Path

import pytest

from tests.data.made_shards import simple_clips, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three uneven shards of 10, 7 and 4 clips with 2 questions each: 42 questions."""
    return write_shards(tmp_path / "shards", [simple_clips(n, clips) for n, clips in enumerate((10, 7, 4))])
