"""Micro-batches against what the made clips and texts say they must hold."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mellow_ds.data.audio import crop_start
from mellow_ds.data.examples import BatchBuilder
from mellow_ds.data.reader import ShardReader
from mellow_ds.errors import FaultError, ShardError
from mellow_ds.prompt import PHRASINGS
from tests.data.made_shards import RATE, CharTokenizer, Clip, clip_key, make_layout, simple_clips, write_shards

WINDOW = 400


def builder(folder: Path, seed: int | None = 7, **options: object) -> BatchBuilder:
    layout = make_layout(**options.pop("layout", {}))
    return BatchBuilder(ShardReader([folder], RATE), CharTokenizer(), layout, WINDOW, seed, **options)


def places(*pairs: tuple[int, int], epoch: int = 0) -> np.ndarray:
    return np.array([(*pair, epoch) for pair in pairs], dtype=np.int64).reshape(-1, 3)


def text(ids: list[int]) -> str:
    return "".join(chr(number - 1) for number in ids if number)


def window_of(clip: Clip, start: int) -> torch.Tensor:
    samples = clip.samples()[start : start + WINDOW]
    return torch.from_numpy(np.pad(samples, (0, WINDOW - len(samples))))


def test_rows_hold_the_texts_and_clips_of_their_examples(tmp_path: Path) -> None:
    clips = simple_clips(0, 4, questions_each=3)
    built = builder(write_shards(tmp_path / "s", [clips])).build(places((0, 0), (0, 5), epoch=2))
    batch = built.batch
    rows = [
        [int(i) for i, m in zip(*row, strict=True) if m]
        for row in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert [text(row) for row in rows] == ["question 0 0 0 answer 0", "question 0 1 2? answer 1"]
    assert [text([i for i in row if i != -100]) for row in batch.labels.tolist()] == [" answer 0", " answer 1"]
    assert (batch.labels[batch.labels != -100] == batch.input_ids[batch.labels != -100]).all()
    assert [len(row) - len(text(row)) for row in rows] == [8 + 1, 4 + 1]  # audio and separators, end-of-text
    assert batch.clip_row.tolist() == [0, 0, 1]
    assert batch.clip_start.tolist() == [0, 4, 0]
    for index, clip in zip(batch.clip_index.tolist(), (clips[0], clips[1], clips[1]), strict=True):
        start = crop_start(clip.num_frames, WINDOW, 7, 2, clip.key)
        assert torch.equal(batch.waveforms[index], window_of(clip, start))
    assert len(batch.waveforms) == 2


def test_a_clip_that_several_examples_share_is_read_and_decoded_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 4, questions_each=3)])
    built = builder(folder).build(places((0, 0), (0, 1), (0, 2), (0, 4), epoch=0))
    assert built.batch.clip_index.tolist() == [0, 1, 0, 0, 1]
    assert built.batch.waveforms.shape == (2, WINDOW)
    assert built.stats.num_samples == 2
    assert built.stats.num_examples == 4


def test_nothing_is_padded_beyond_the_micro_batch(tmp_path: Path) -> None:
    make = builder(write_shards(tmp_path / "s", [simple_clips(0, 4)]))
    both = make.build(places((0, 2), (0, 0), epoch=0)).batch
    assert both.input_ids.shape[1] == int(both.attention_mask.sum(1).max())
    alone = make.build(places((0, 2), epoch=0)).batch
    assert alone.attention_mask.all()


def test_training_draws_phrasings_and_crops_by_epoch_and_evaluation_takes_the_first(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 6, num_frames=900)])
    captions = [(0, 2 * n + 1) for n in range(6)]
    make = builder(folder)
    epochs = [make.build(places(*captions, epoch=epoch)).batch for epoch in range(4)]
    assert torch.equal(epochs[1].waveforms, make.build(places(*captions, epoch=1)).batch.waveforms)
    assert not torch.equal(epochs[0].waveforms, epochs[1].waveforms)
    prompts = {text(row.tolist()) for batch in epochs for row in batch.input_ids}
    family = PHRASINGS["caption first audio"]
    assert all(any(prompt.startswith(phrase) for prompt in prompts) for phrase in family)
    evaluated = builder(folder, seed=None).build(places(*captions, epoch=3))
    for clip, waveform in zip(simple_clips(0, 6, num_frames=900), evaluated.batch.waveforms, strict=True):
        assert torch.equal(waveform, window_of(clip, 0))
    assert {example.question for example in evaluated.examples} == {family[0]}


def test_rows_for_generation_end_before_the_answer(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 4)])
    built = builder(folder, seed=None, with_answers=False).build(places((0, 0), (0, 2), epoch=0))
    assert [text(row.tolist()) for row in built.batch.input_ids] == ["question 0 0 0", "question 0 1 0?"]
    assert built.batch.attention_mask[:, -1].all()
    assert built.batch.num_answer_tokens == 0
    example = built.examples[0]
    clips = simple_clips(0, 4)
    assert example.clips == (clips[0].key, clips[1].key)
    assert example.sources == tuple(f"folder/{clip.key[:6]}.wav" for clip in clips[:2])
    assert (example.question, example.answer, example.subtype) == ("question 0 0 0", "answer 0", "kind-2")
    assert built.batch.example_ids == tuple(example.id for example in built.examples)


def test_silence_replaces_the_audio_and_nothing_else(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [simple_clips(0, 4)])
    heard, silent = (
        builder(folder, None, with_answers=False, silence_audio=silence).build(places((0, 0), (0, 2), epoch=0)).batch
        for silence in (False, True)
    )
    assert heard.waveforms.any()
    assert not silent.waveforms.any()
    assert torch.equal(heard.input_ids, silent.input_ids)
    assert torch.equal(heard.clip_index, silent.clip_index)


def test_cut_prompts_and_answers_are_counted(tmp_path: Path) -> None:
    clips = [
        Clip(clip_key(0), questions=[((), "p" * 11, "a" * 4), ((), "p" * 10, "a" * 3), ((), "p" * 12, "a" * 9)]),
    ]
    folder = write_shards(tmp_path / "s", [clips])
    make = builder(folder, layout={"max_prompt_tokens": 12, "prompt_suffix": (7, 0), "max_answer_tokens": 5})
    stats = make.build(places((0, 0), (0, 1), (0, 2), epoch=0)).stats
    assert (stats.cut_prompts, stats.cut_answers) == (2, 2)  # the answers gain a blank and end-of-text


def test_no_examples_make_the_empty_batch(tmp_path: Path) -> None:
    built = builder(write_shards(tmp_path / "s", [simple_clips(0, 2)])).build(places(epoch=0))
    assert built.batch.num_examples == built.batch.num_answer_tokens == built.stats.num_examples == 0
    assert built.batch.waveforms.shape == (1, WINDOW)


def test_the_two_clip_layout_fills_a_missing_clip_with_another_of_the_shard(tmp_path: Path) -> None:
    clips = simple_clips(0, 5)
    folder = write_shards(tmp_path / "s", [clips])
    make = builder(folder, layout={"num_clips": 2})
    chosen = set()
    for epoch in range(60):
        batch = make.build(places((0, 2), (0, 0), epoch=epoch)).batch
        assert batch.clip_row.tolist() == [0, 0, 1, 1]
        first, second = (batch.waveforms[index] for index in batch.clip_index[:2])
        number = [int(w[0]) // 1000 for w in (first, second)]
        assert number[0] == 1
        chosen.add(number[1])
        assert [int(batch.waveforms[i][0]) // 1000 for i in batch.clip_index[2:]] == [0, 1]
    assert chosen == {0, 2, 3, 4}
    evaluated = [
        builder(folder, None, layout={"num_clips": 2}).build(places((0, 2), epoch=epoch)).batch for epoch in (0, 5)
    ]
    assert torch.equal(evaluated[0].waveforms, evaluated[1].waveforms)


def test_a_lone_clip_has_silence_beside_it(tmp_path: Path) -> None:
    clips = [Clip(clip_key(0), questions=[((), "q", "a")], first_value=5)]
    batch = builder(write_shards(tmp_path / "s", [clips]), layout={"num_clips": 2}).build(places((0, 0), epoch=0)).batch
    assert batch.waveforms[0].any()
    assert not batch.waveforms[1].any()
    assert batch.clip_index.tolist() == [0, 1]


def test_more_clips_than_the_layout_has_are_refused(tmp_path: Path) -> None:
    keys = [clip_key(n) for n in range(3)]
    clips = [Clip(key, questions=[(tuple(keys[1:]), "q", "a")] if key == keys[0] else []) for key in keys]
    folder = write_shards(tmp_path / "s", [clips])
    assert builder(folder).build(places((0, 0), epoch=0)).batch.clip_start.tolist() == [0, 4, 8]
    with pytest.raises(ShardError, match=r"is about 3 clips, but model\.layout 'mellow' takes 2"):
        builder(folder, layout={"num_clips": 2}).build(places((0, 0), epoch=0))


def test_a_bad_clip_leaves_its_examples_out_and_is_named_once(tmp_path: Path) -> None:
    clips = simple_clips(0, 5)
    clips[1].audio = b"fLaC is not audio"
    built = builder(write_shards(tmp_path / "s", [clips])).build(places((0, 0), (0, 2), (0, 3), (0, 4), epoch=0))
    assert built.stats.num_examples == 1  # 0 names clip 1 as its second, 2 and 3 are about it
    assert built.stats.skipped_examples == 3
    assert [error.kind for error in built.stats.bad_samples] == ["audio"]
    assert clips[1].key in str(built.stats.bad_samples[0])
    (index,) = built.batch.clip_index.tolist()
    start = crop_start(clips[2].num_frames, WINDOW, 7, 0, clips[2].key)
    assert torch.equal(built.batch.waveforms[index], window_of(clips[2], start))


def test_a_tokenizer_that_fails_names_the_question(tmp_path: Path) -> None:
    clips = [Clip(clip_key(0), questions=[((), "a \N{BELL} rings", "a")])]
    with pytest.raises(FaultError, match=rf"question \w+ about {clip_key(0)}: the tokenizer fails"):
        builder(write_shards(tmp_path / "s", [clips])).build(places((0, 0), epoch=0))
