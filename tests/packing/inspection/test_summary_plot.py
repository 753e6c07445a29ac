"""The picture of `mellow-shards inspect`: drawn for ordinary and odd folders, and one line where it cannot be."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellow_ds.errors import PackingError
from mellow_ds.packing.inspection.plot import plot_summary
from mellow_ds.packing.inspection.summary import Summary
from mellow_ds.shard_format import Manifest

PNG = b"\x89PNG\r\n\x1a\n"


def summary(num_clips: int, num_subtypes: int = 3, **changes: Any) -> Summary:
    """A made-up folder."""
    draw = np.random.default_rng(0)
    subtypes = {f"subtype number {place} with a long name": 10 + place for place in range(num_subtypes)}
    manifest = Manifest(32_000, "flac", num_clips, sum(subtypes.values()), subtypes, (), {})
    return Summary(
        **{
            "manifest": manifest,
            "num_stored": num_clips,
            "num_bytes": 1,
            "clip_seconds": draw.uniform(1, 30, num_clips),
            "clip_questions": draw.integers(1, 200, num_clips),
            "prompt_words": draw.integers(1, 40, 3 * num_clips),
            "answer_words": np.full(3 * num_clips, 5),
            "peak_dbfs": draw.uniform(-20, 0, min(num_clips, 200)),
            "rms_dbfs": draw.uniform(-40, -10, min(num_clips, 200)),
            **changes,
        }
    )


@pytest.mark.parametrize(
    "drawn",
    [
        summary(500, num_subtypes=40),
        summary(1, clip_seconds=np.array([10.0])),
        summary(3, peak_dbfs=np.zeros(0), rms_dbfs=np.zeros(0)),
        summary(0, num_subtypes=0),
    ],
    ids=["many", "one clip", "no levels", "empty"],
)
def test_a_picture_is_drawn(drawn: Summary, tmp_path: Path) -> None:
    plot_summary("shards/train", drawn, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(PNG)


def test_bins_of_whole_numbers_cover_as_many_each() -> None:
    from mellow_ds.packing.inspection.plot import _edges

    for low, high in ((1, 1), (0, 39), (0, 40), (3, 1000)):
        edges = _edges(np.array([low, high]), whole=True)
        assert edges[0] == low - 0.5
        assert edges[-1] > high
        assert len(edges) <= 42
        assert len(set(np.diff(edges))) == 1


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PackingError, match=r"--plot .*picture\.what cannot be written"):
        plot_summary("train", summary(5), tmp_path / "picture.what")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PackingError, match=r"pip install 'mellow-ds\[plot\]'"):
        plot_summary("train", summary(5), tmp_path / "picture.png")
