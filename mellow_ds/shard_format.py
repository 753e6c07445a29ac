"""The one definition of a shard folder that writer and reader share: sample, index row, manifest.

A shard folder holds `manifest.json` and, for each shard, `shard-000000.tar` and `shard-000000.index.npy`.
A tar is plain WebDataset: for each clip the members `KEY.flac` (or `.wav`, `.opus`, or `.f16` with an encoder's
features in place of the audio) and `KEY.json`, adjacent. The index is a numpy array of `INDEX_DTYPE`, one row a sample,
so that a sample is read by two offsets and nothing else is touched. Nothing here decodes audio.
"""

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import xxhash

from mellow_ds.errors import ShardError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
AUDIO_EXTENSIONS = ("flac", "wav", "opus")
FEATURES_EXTENSION = "f16"
FEATURES = "features"  # the codec of shards that hold an encoder's features
MAX_MEMBER_BYTES = 256 * 1024 * 1024  # a longer member is not one of ours
KEY_LENGTH = 32  # hexadecimal digits of a content hash

INDEX_DTYPE = np.dtype(
    [
        ("key", f"S{KEY_LENGTH}"),
        ("audio_offset", "<u8"),  # bytes from the start of the tar to the audio payload
        ("audio_bytes", "<u4"),
        ("json_offset", "<u8"),
        ("json_bytes", "<u4"),
        ("checksum", "<u8"),  # XXH3-64 of audio payload + JSON payload
        ("num_frames", "<u4"),  # samples of the clip at the manifest's rate
        ("num_questions", "<u4"),
    ]
)


@dataclass(frozen=True)
class Question:
    """One question with its answer, as a shard holds it. An example is a question with its clips."""

    id: str  # content hash over clips, texts and subtype
    clips: tuple[str, ...]  # keys, in the order of the sequence; the first is the sample that holds the question
    input: str  # the prompt, or a placeholder that stands for a family of phrasings
    answer: str
    subtype: str
    taskname: str = ""
    captions: tuple[str, ...] = ()  # of the clips, where the record has them: caption placeholders answer with them


@dataclass(frozen=True)
class SampleInfo:
    """The JSON member of a sample: the clip and the questions that stand with it."""

    key: str  # content hash of the source file
    source: str  # path of the source file below the audio root, `/` between folders
    sample_rate: int  # Hz, of the stored audio
    num_frames: int
    questions: tuple[Question, ...]

    def to_json(self) -> bytes:
        """UTF-8 JSON, the same bytes for the same content."""
        # vars() and not asdict(): copying every question took a third of the time of packing short clips
        content = {**vars(self), "questions": [vars(question) for question in self.questions]}
        return json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, payload: bytes, where: str) -> "SampleInfo":
        """The inverse of `to_json`; raises `ShardError` naming `where`."""
        return _decode(_SAMPLE_DECODER, payload, where)


class SampleText(msgspec.Struct):
    """The JSON member of a sample with its questions not yet decoded: most are not asked for."""

    key: str
    num_frames: int
    questions: list[msgspec.Raw]

    @classmethod
    def from_json(cls, payload: bytes | memoryview, where: str) -> "SampleText":
        """Raises `ShardError` naming `where`."""
        return _decode(_TEXT_DECODER, payload, where)

    def question(self, number: int, where: str) -> Question:
        """One of the questions; raises `ShardError` naming `where`."""
        return _decode(_QUESTION_DECODER, self.questions[number], where)


# 15 us for one of 22 questions, where json.loads and building all of them take 180
_SAMPLE_DECODER = msgspec.json.Decoder(SampleInfo)
_TEXT_DECODER = msgspec.json.Decoder(SampleText)
_QUESTION_DECODER = msgspec.json.Decoder(Question)

Decoded = TypeVar("Decoded")


def _decode(decoder: "msgspec.json.Decoder[Decoded]", payload: Any, where: str) -> Decoded:
    """The payload as the decoder's type, all types checked."""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ShardError(
            f"{where}: the JSON member is not a sample of this format ({error}): build the shards anew"
        ) from None


@dataclass(frozen=True)
class FeatureInfo:
    """What the features of a shard folder are: those of a frozen encoder, and of which.

    The member of a clip holds `num_crops` times embeddings and posteriors, little-endian float16, without a header: one
    crop of the clip window where the clip is no longer than that, else up to `max_crops`, evenly spaced from its start.
    """

    encoder: str  # hash over weights, sizes and front end of the encoder
    encoder_name: str  # for people: kind and origin
    clip_samples: int  # of the window that the encoder saw, at the manifest's rate
    embeddings: tuple[int, int]  # [E, D] of a crop
    posteriors: tuple[int, int]  # [P, classes] of a crop; (0, 0): the encoder gives none
    max_crops: int

    @property
    def crop_bytes(self) -> int:
        """Bytes of a crop."""
        return 2 * (self.embeddings[0] * self.embeddings[1] + self.posteriors[0] * self.posteriors[1])


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard."""

    name: str  # file name of the tar
    num_bytes: int  # of the tar
    sha256: str  # of the tar
    index_sha256: str
    num_samples: int  # clips, copies for pairs included
    num_questions: int


@dataclass(frozen=True)
class Manifest:
    """What the shards of a folder hold and how their audio was made."""

    sample_rate: int  # Hz
    codec: str  # "flac", "pcm", "opus" or "features"
    num_clips: int  # different clips
    num_questions: int
    subtypes: dict[str, int]  # questions by subtype
    shards: tuple[ShardInfo, ...]
    sources: dict[str, Any]  # what it was built from: JSON files with their SHA-256, tool version
    features: FeatureInfo | None = None  # with the codec "features"
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Hash over everything that the content of the stream depends on; a resumed run compares it."""
        lines = [f"{self.format_version} {self.sample_rate} {self.codec}"]
        if self.features is not None:
            lines.append(f"{self.features.encoder} {self.features.clip_samples} {self.features.max_crops}")
        lines += [f"{s.name} {s.num_bytes} {s.sha256} {s.num_samples} {s.num_questions}" for s in self.shards]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:KEY_LENGTH]

    def to_json(self) -> str:
        """JSON text, the same for the same content."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def index_name(shard_name: str) -> str:
    """File name of the index of the tar `shard_name`."""
    return shard_name.removesuffix(".tar") + ".index.npy"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a shard folder; raises `ShardError` where it is missing, of another version or not one."""
    path = Path(folder) / MANIFEST_NAME
    if not Path(folder).is_dir():
        raise ShardError(f"shard folder {folder} is not there: make it with `mellow-shards build`, or correct its name")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"{folder} holds no {MANIFEST_NAME}: the build did not finish, or it is no shard folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read ({error}): build the shards anew") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path} has format version {version}; this program reads version {FORMAT_VERSION}: build the shards anew"
        )
    try:
        shards = tuple(ShardInfo(**shard) for shard in content.pop("shards"))
        features = _feature_info(content.pop("features", None))
        manifest = Manifest(shards=shards, features=features, **content)
        if (features is None) == (manifest.codec == FEATURES):
            raise KeyError("features")
    except (TypeError, KeyError) as error:
        raise ShardError(f"{path} lacks or misnames a field ({error}): build the shards anew") from None
    for shard in manifest.shards:
        if not isinstance(shard.name, str) or not isinstance(shard.num_bytes, int):
            raise ShardError(
                f"{path} names a shard by {shard.name!r} of {shard.num_bytes!r} bytes: build the shards anew"
            )
        if Path(shard.name).name != shard.name or not shard.name.endswith(".tar"):
            raise ShardError(f"{path} names the shard '{shard.name}', which is not a file name of this folder")
    return manifest


def _feature_info(content: dict[str, Any] | None) -> FeatureInfo | None:
    if content is None:
        return None
    shapes = {name: (int(content[name][0]), int(content[name][1])) for name in ("embeddings", "posteriors")}
    return FeatureInfo(**{**content, **shapes})


def read_index(folder: str | Path, shard: ShardInfo) -> np.ndarray:
    """The index rows [num_samples] of a shard (INDEX_DTYPE); raises `ShardError` where it does not fit the manifest."""
    path = Path(folder) / index_name(shard.name)
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}): build the shards anew") from None
    if hashlib.sha256(payload).hexdigest() != shard.index_sha256:
        raise ShardError(f"{path} is not the index that the manifest names (SHA-256 differs): build the shards anew")
    try:
        rows = np.load(io.BytesIO(payload), allow_pickle=False)
    except Exception as error:
        # numpy's, of many kinds: a header that is none, announces objects to unpickle or more rows than memory holds
        problem = str(error).partition("\n")[0]
        raise ShardError(f"{path} is no index ({type(error).__name__}: {problem}): build the shards anew") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != INDEX_DTYPE or len(rows) != shard.num_samples:
        raise ShardError(f"{path} has {len(rows)} rows; the manifest says {shard.num_samples}: build the shards anew")
    return rows


def check_shard_size(folder: str | Path, shard: ShardInfo) -> None:
    """Raise `ShardError` where the tar is missing or its size is not the manifest's."""
    path = Path(folder) / shard.name
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}): copy it again or build the shards anew") from None
    if found != shard.num_bytes:
        raise ShardError(
            f"{path} has {found} bytes; the manifest says {shard.num_bytes}: copy it again or build the shards anew"
        )


def sample_checksum(audio: bytes | memoryview, info: bytes | memoryview) -> int:
    """The checksum that the index holds for a sample: XXH3-64, which no flipped bit survives and no disk outruns."""
    digest = xxhash.xxh3_64()
    digest.update(audio)
    digest.update(info)
    return digest.intdigest()


def question_id(clips: tuple[str, ...], prompt: str, answer: str, subtype: str, occurrence: int) -> str:
    """Content hash of a question; `occurrence` tells apart records that say the same."""
    content = json.dumps([clips, prompt, answer, subtype, occurrence], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]
