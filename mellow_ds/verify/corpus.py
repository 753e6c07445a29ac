"""A few made-up sounds with questions, packed into shards: what the runs that are compared read."""

from dataclasses import dataclass
from pathlib import Path

from mellow_ds.config.schema import DataConfig
from mellow_ds.data.corpus import iterate_texts
from mellow_ds.data.reader import ShardReader
from mellow_ds.model.tokenizer import train_tokenizer
from mellow_ds.packing.build import build_shards
from mellow_ds.packing.synthesis.corpus import synthesize
from mellow_ds.verify.small import CLIP_SAMPLES, SAMPLE_RATE

_NUM_CLIPS = 6  # give some 40 questions
_SHARD_MEGABYTES = 0.5
_VOCABULARY = 512  # at most; the words there are make about 100


@dataclass(frozen=True)
class Corpus:
    """Where the shards and the tokenizer made of their texts are."""

    shards: Path
    tokenizer: Path
    vocabulary: int  # ids of the tokenizer

    def data_config(self) -> DataConfig:
        """Reads a tenth of a second of each clip."""
        return DataConfig(
            shards=(str(self.shards),), sampling_rate=SAMPLE_RATE, segment_seconds=CLIP_SAMPLES / SAMPLE_RATE
        )


def make_corpus(folder: Path) -> Corpus:
    """Make and pack it below `folder`."""
    made, shards, saved = folder / "sounds", folder / "shards", folder / "tokenizer"
    synthesize(made, {"train": _NUM_CLIPS}, seed=3, audio_format="wav", workers=0, sample_rate=SAMPLE_RATE)
    build_shards(
        [made / "train.json"], made, shards, sample_rate=SAMPLE_RATE, shard_megabytes=_SHARD_MEGABYTES, workers=1
    )
    data = Corpus(shards, saved, 0).data_config()
    tokenizer = train_tokenizer(iterate_texts(ShardReader.from_config(data.shards, data)), _VOCABULARY)
    tokenizer.save_pretrained(saved)
    return Corpus(shards, saved, len(tokenizer))
