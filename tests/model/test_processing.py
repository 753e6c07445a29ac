"""The processor gives the rows that training lays out, and opens again from a folder."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from mellow_ds.errors import MellowError
from mellow_ds.model.processing import MellowProcessor, build_processor
from mellow_ds.prompt import Layout


@pytest.fixture
def processor(model, tokenizer, layout) -> MellowProcessor:
    return build_processor(model, tokenizer, layout)


def test_rows_are_those_that_evaluation_batches_have(processor, lay_out, waveforms):
    batch = lay_out(
        [((0,), "is it a bell? a) yes b) no", None), ((1, 2), "yes", None), ((), "no! never", None)], side="left"
    )
    clips = [clip.numpy() for clip in waveforms]
    found = processor(
        text=["Is it a bell? a) yes b) no ", "yes", "no! never"], audio=[[clips[0]], clips[1:], []], return_tensors="pt"
    )
    assert set(found) == {"input_ids", "attention_mask", "waveforms", "clip_row", "clip_start", "clip_index"}
    for name, value in found.items():
        assert torch.equal(value, getattr(batch, name)), name


def test_one_prompt_takes_its_clips_without_nesting(processor, waveforms):
    clips = [clip.numpy() for clip in waveforms[:2]]
    flat, nested = processor("yes", clips), processor(["yes"], [clips])
    assert all(torch.equal(flat[name], nested[name]) for name in flat)


def test_a_placeholder_is_asked_in_its_first_phrasing(processor):
    placeholder, spelled = processor("caption first audio"), processor("describe the first audio")
    assert torch.equal(placeholder["input_ids"], spelled["input_ids"])


def test_short_clips_are_filled_with_zeros_and_long_ones_cut_from_the_start(processor):
    short, long = np.ones(1000), np.arange(4000) / 4000
    waveforms = processor("yes", [short, long])["waveforms"]
    assert waveforms.shape == (2, 3200)
    assert waveforms.dtype == torch.float32
    assert waveforms[0, :1000].eq(1).all()
    assert waveforms[0, 1000:].eq(0).all()
    np.testing.assert_allclose(waveforms[1].numpy(), long[:3200], rtol=1e-6)


def test_it_is_the_same_after_saving(processor, tmp_path, waveforms):
    processor.save_pretrained(tmp_path)
    clips = [clip.numpy() for clip in waveforms]
    expected = processor("is it a bell?", clips)
    for read in (MellowProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert read.row_layout == processor.row_layout
        found = read("is it a bell?", clips)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_generated_ids_become_text(processor, model, waveforms):
    output = model.generate(**processor(["yes", "no! never"], [[waveforms[0].numpy()], []]), max_new_tokens=3)
    texts = processor.batch_decode(output, skip_special_tokens=True)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)


def test_mellow_s_layout_always_holds_two_clips_and_a_full_prompt(model, tokenizer, waveforms):
    layout = Layout(
        audio_tokens=model.num_audio_tokens,
        separator_id=0,
        end_id=0,
        max_prompt_tokens=8,
        max_answer_tokens=4,
        num_clips=2,
        prompt_suffix=(1, 0),
        prompt_pad_id=5,
    )
    processor = build_processor(model, tokenizer, layout)
    found = processor(["yes", "no! never"], [[waveforms[0].numpy()], [waveforms[1].numpy(), waveforms[2].numpy()]])
    length = 2 * (model.num_audio_tokens + 1)
    (yes,) = tokenizer("yes")["input_ids"]
    assert found["input_ids"].shape == (2, length + 8)
    assert found["input_ids"][0, length:].tolist() == [yes, 1, 0, 5, 5, 5, 5, 5]
    assert found["attention_mask"].all()
    assert found["clip_index"].tolist() == [0, 0, 1, 2]
    with pytest.raises(MellowError, match="1 to 2"):
        processor("yes", [])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"audio": [np.zeros((2, 100))]}, "mono"),
        ({"audio": [np.array([0.0, np.nan])]}, "finite"),
        ({"audio": [np.zeros(10)], "sampling_rate": 44_100}, "44100"),
        ({"text": ["yes", "no"], "audio": [[]]}, "2 prompts"),
        ({"return_tensors": "np"}, "return_tensors"),
    ],
)
def test_unusable_input_is_named(processor, arguments, named):
    with pytest.raises(MellowError, match=named):
        processor(**{"text": "yes", **arguments})
