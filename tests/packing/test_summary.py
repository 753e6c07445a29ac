"""The table of `mellow-shards inspect`: counts by hand."""

from typing import Any

import numpy as np

from mellow_ds.packing.build import build_shards
from mellow_ds.packing.summary import format_summary, summarize


def test_counts_and_durations_are_those_of_the_corpus(corpus: Any) -> None:
    for name, seconds in (("a", 0.1), ("b", 0.2), ("c", 0.6)):
        corpus.tone(f"{name}.wav", seconds=seconds, hertz=100 + ord(name))
        corpus.ask(f"{name}.wav", subtype="single")
    corpus.ask("a.wav", "b.wav", subtype="pair")
    corpus.ask("a.wav", "c.wav", subtype="pair")
    build_shards([corpus.write()], corpus.root, corpus.folder / "out", workers=1, shard_megabytes=0.001)
    summary = summarize(corpus.folder / "out")
    np.testing.assert_allclose(sorted(summary.clip_seconds), [0.1, 0.2, 0.6])
    assert sorted(summary.clip_questions) == [1, 1, 3]
    assert summary.num_bytes == sum(path.stat().st_size for path in (corpus.folder / "out").glob("*.tar"))
    lines = {line.split("  ")[0]: line for line in format_summary("out", summary).splitlines()}
    assert "0.10 / 0.20 / 0.60" in lines["seconds a clip"]
    assert "1 / 1 / 3" in lines["questions a clip"]
    assert lines["pair"].split() == ["pair", "2"]
    assert lines["single"].split() == ["single", "3"]
    assert lines["questions"].split() == ["questions", "5"]
