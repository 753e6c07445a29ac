"""All texts of a shard folder, with every phrasing."""

from pathlib import Path

from mellow_ds.data.corpus import iterate_texts
from mellow_ds.data.reader import ShardReader
from mellow_ds.prompt import PHRASINGS
from tests.data.made_shards import RATE, Clip, clip_key, write_shards


def test_prompts_answers_and_all_phrasings_of_all_shards(tmp_path: Path) -> None:
    clips = [
        Clip(clip_key(0), questions=[((), "What IS heard?", "A dog"), ((), "caption first audio", "")]),
        Clip(clip_key(1), questions=[]),
        Clip(clip_key(2), questions=[((), "And here?", "A cat")]),
    ]
    folder = write_shards(tmp_path / "s", [clips[:2], clips[2:]])
    caption = f"the audio 1 is caption of {clip_key(0)[:4]}."
    expected = ["what is heard?", "a dog", *PHRASINGS["caption first audio"], caption, "and here?", "a cat"]
    assert list(iterate_texts(ShardReader([folder], RATE))) == expected
