"""The table of `mellow-shards inspect`: counts by hand."""

from typing import Any

import numpy as np
import pytest

from mellow_ds.errors import ShardError
from mellow_ds.packing.build import build_shards
from mellow_ds.packing.inspection.summary import format_summary, summarize


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


def test_texts_are_measured_in_words_as_the_model_is_given_them(corpus: Any) -> None:
    corpus.tone("a.wav")
    corpus.ask("a.wav", input="is it a tone?", answer="yes")
    corpus.ask("a.wav", input="caption first audio", answer="", caption1="A long  tone.")
    build_shards([corpus.write()], corpus.root, corpus.folder / "out", workers=1)
    summary = summarize(corpus.folder / "out")
    assert sorted(summary.prompt_words) == [4, 4]  # "describe the first audio"
    assert sorted(summary.answer_words) == [1, 7]  # "the audio 1 is a long tone."
    assert "1 / 4 / 7" in format_summary("out", summary)


def test_levels_are_those_of_the_clips_with_the_first_keys(corpus: Any) -> None:
    for number in range(4):
        corpus.tone(f"{number}.wav", seconds=0.1, hertz=100 * (number + 1))  # amplitude 0.5: -6.0 and -9.0 dBFS
        corpus.ask(f"{number}.wav")
    build_shards([corpus.write()], corpus.root, corpus.folder / "out", workers=1, sample_rate=8_000)
    summary = summarize(corpus.folder / "out", num_levels=3)
    np.testing.assert_allclose(summary.peak_dbfs, [-6.02] * 3, atol=0.05)
    np.testing.assert_allclose(summary.rms_dbfs, [-9.03] * 3, atol=0.05)
    again = summarize(corpus.folder / "out", num_levels=100)
    assert len(again.peak_dbfs) == 4
    assert not len(summarize(corpus.folder / "out").peak_dbfs)


def test_a_damaged_text_is_named(corpus: Any) -> None:
    corpus.ask_tones(3)
    build_shards([corpus.write()], corpus.root, corpus.folder / "out", workers=1)
    tar = corpus.folder / "out" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2_000])
    with pytest.raises(ShardError, match=r"shard-000000\.tar, clip [0-9a-f]{32}: the tar ends within it"):
        summarize(corpus.folder / "out")
