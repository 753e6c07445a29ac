"""Who speaks: rank 0, and other ranks of what only they know."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mellow_ds.log import ALIKE, append_to_log_file, setup_logging
from mellow_ds.world import World


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    setup_logging(World())


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, ["INFO at work", "WARNING no weights", "WARNING bad sample"]),
        (1, ["WARNING bad sample"]),
    ],
)
def test_what_all_ranks_come_to_is_said_once(rank: int, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(World(rank=rank, size=2))
    log = logging.getLogger("mellow_ds.cli")
    log.info("at work")
    log.warning("no weights", extra=ALIKE)
    log.warning("bad sample")
    lines = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("[rank 1] ").partition(" ")[2] for line in lines] == said


def test_lines_for_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = setup_logging(World(), tmp_path / "log.txt")
    logger.info("at work")
    append_to_log_file("error: no good")
    assert [line.partition(" ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "INFO at work", "no good"
    ]  # fmt: skip
    assert "no good" not in capsys.readouterr().err
