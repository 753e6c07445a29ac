"""Padding, placements and the empty batch against hand-made cases."""

import pytest
import torch

from mellow_ds.data.collate import collate, empty_batch, prompt_row
from mellow_ds.prompt import ExampleRow
from tests.data.made_shards import make_layout

ROWS = [
    ExampleRow((0, 0, 5, 6, 7), 2, (0,)),
    ExampleRow((0, 0, 0, 0, 5, 6, 7, 8), 3, (0, 2)),
]


def test_training_rows_are_padded_on_the_right() -> None:
    batch = collate(ROWS, [[1], [0, 1]], {"waveforms": torch.zeros(2, 4)}, ("a", "b"), pad_id=9, pad_left=False)
    assert batch.input_ids.tolist() == [[0, 0, 5, 6, 7, 9, 9, 9], [0, 0, 0, 0, 5, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [[1] * 5 + [0] * 3, [1] * 8]
    assert batch.labels.tolist() == [[-100, -100, -100, 6, 7, -100, -100, -100], [-100] * 5 + [6, 7, 8]]
    assert batch.clip_row.tolist() == [0, 1, 1]
    assert batch.clip_start.tolist() == [0, 0, 2]
    assert batch.clip_index.tolist() == [1, 0, 1]
    assert batch.num_examples == 2
    assert batch.num_answer_tokens == 5


def test_generation_rows_are_padded_on_the_left_with_their_clips_moved() -> None:
    layout = make_layout(audio_tokens=1)
    rows = [prompt_row(layout, 1, [5]), prompt_row(layout, 2, [6, 7])]
    batch = collate(rows, [[0], [0, 1]], {"waveforms": torch.zeros(2, 4)}, ("a", "b"), pad_id=9, pad_left=True)
    assert batch.input_ids.tolist() == [[9, 9, 9, 0, 0, 5], [0, 0, 0, 0, 6, 7]]
    assert batch.attention_mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert batch.clip_start.tolist() == [3, 0, 2]
    assert batch.num_answer_tokens == 0


@pytest.mark.parametrize(("num_clips", "placements"), [(0, 1), (2, 2)])
def test_the_empty_batch_has_one_silent_clip_and_counts_nothing(num_clips: int, placements: int) -> None:
    batch = empty_batch(make_layout(num_clips=num_clips), {"waveforms": torch.zeros(1, 400)})
    assert batch.waveforms.shape == (1, 400)
    assert not batch.waveforms.any()
    assert batch.input_ids.shape == (1, 4 * placements + 1)
    assert batch.num_examples == batch.num_answer_tokens == 0
    assert batch.clip_index.tolist() == [0] * placements


def test_ids_are_int64_and_waveforms_float32() -> None:
    batch = collate(ROWS, [[0], [0, 0]], {"waveforms": torch.zeros(1, 4)}, ("a", "b"), 0, pad_left=False)
    names = ("input_ids", "attention_mask", "labels", "clip_row", "clip_start", "clip_index")
    assert {getattr(batch, name).dtype for name in names} == {torch.int64}
    assert batch.waveforms.dtype == torch.float32
