"""Small shard folders, written here from the format's definition alone, and a tokenizer of characters."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from mellow_ds.prompt import Layout
from mellow_ds.shard_format import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    Manifest,
    Question,
    SampleInfo,
    ShardInfo,
    index_name,
    question_id,
    sample_checksum,
)

RATE = 8000


@dataclass
class Clip:
    """One clip of a made shard: a ramp, so that every sample says where it stands."""

    key: str
    num_frames: int = 400
    questions: list[tuple[tuple[str, ...], str, str]] = field(default_factory=list)  # (other clips, prompt, answer)
    audio: bytes | None = None  # instead of the ramp
    first_value: int = 0

    def samples(self) -> np.ndarray:
        """int16 [num_frames]."""
        return ((np.arange(self.num_frames) + self.first_value) % 30_000).astype(np.int16)


class CharTokenizer:
    """One token a character: id is the code plus 1; 0 is the end."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        if "\N{BELL}" in text:
            raise ValueError("a text that this tokenizer cannot read")
        return {"input_ids": [ord(letter) + 1 for letter in text]}


def clip_key(name: object) -> str:
    """A content hash for a name."""
    return hashlib.sha256(str(name).encode()).hexdigest()[:32]


def encode_audio(samples: np.ndarray, codec: str) -> bytes:
    """A FLAC or WAV file of int16 samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC" if codec == "flac" else "WAV", subtype="PCM_16")
    return file.getvalue()


def _sample_of(clip: Clip) -> SampleInfo:
    questions = []
    for number, (others, prompt, answer) in enumerate(clip.questions):
        clips = (clip.key, *others)
        captions = tuple(f"caption of {key[:4]}" for key in clips)
        name = question_id(clips, prompt, answer, "kind", number)
        questions.append(Question(name, clips, prompt, answer, f"kind-{len(clips)}", "task", captions))
    return SampleInfo(clip.key, f"folder/{clip.key[:6]}.wav", RATE, clip.num_frames, tuple(questions))


def write_shard(folder: Path, number: int, clips: Sequence[Clip], codec: str) -> ShardInfo:
    """One tar and its index."""
    path = folder / f"shard-{number:06d}.tar"
    rows = np.zeros(len(clips), INDEX_DTYPE)
    with tarfile.open(path, "w") as tar:
        for row, clip in zip(rows, clips, strict=True):
            info = _sample_of(clip)
            audio = encode_audio(clip.samples(), codec) if clip.audio is None else clip.audio
            members = {"audio": (codec.replace("pcm", "wav"), audio), "json": ("json", info.to_json())}
            for part, (extension, payload) in members.items():
                member = tarfile.TarInfo(f"{clip.key}.{extension}")
                member.size = len(payload)
                row[f"{part}_offset"] = tar.offset + 512
                row[f"{part}_bytes"] = len(payload)
                tar.addfile(member, io.BytesIO(payload))
            row["key"], row["num_frames"], row["num_questions"] = (
                clip.key.encode(),
                clip.num_frames,
                len(info.questions),
            )
            row["checksum"] = sample_checksum(audio, info.to_json())
    index = folder / index_name(path.name)
    np.save(index, rows)
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, index)]
    num_questions = int(rows["num_questions"].sum())
    return ShardInfo(path.name, path.stat().st_size, hashes[0], hashes[1], len(clips), num_questions)


def write_shards(folder: Path, shards: Sequence[Sequence[Clip]], codec: str = "pcm") -> Path:
    """A shard folder of these clips by shard; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = tuple(write_shard(folder, number, clips, codec) for number, clips in enumerate(shards))
    num_questions = sum(info.num_questions for info in infos)
    num_clips = len({clip.key for clips in shards for clip in clips})
    subtypes = dict(Counter(f"kind-{1 + len(q[0])}" for clips in shards for clip in clips for q in clip.questions))
    manifest = Manifest(RATE, codec, num_clips, num_questions, subtypes, infos, {"made": "by a test"})
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def simple_clips(shard: int, num_clips: int, questions_each: int = 2, num_frames: int = 400) -> list[Clip]:
    """Clips with plain questions; each third clip's first question is about the next clip, too."""
    keys = [clip_key((shard, number)) for number in range(num_clips)]
    clips = []
    for number, key in enumerate(keys):
        questions: list[tuple[tuple[str, ...], str, str]] = []
        for asked in range(questions_each):
            others = (keys[(number + 1) % num_clips],) if asked == 0 and number % 3 == 0 and num_clips > 1 else ()
            prompt = "caption first audio" if asked == 1 else f"question {shard} {number} {asked}" + "?" * (number % 4)
            questions.append((others, prompt, f"answer {number}"))
        clips.append(Clip(key, num_frames + 10 * number, questions, first_value=1000 * number))
    return clips


def make_layout(**changes: Any) -> Layout:
    """A compact layout with 3 audio tokens a clip; ids as `CharTokenizer` gives them."""
    settings = {"audio_tokens": 3, "separator_id": 0, "end_id": 0, "max_prompt_tokens": 80, "max_answer_tokens": 90}
    return Layout(**{**settings, **changes})
