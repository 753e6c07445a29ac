"""Mutated audio files and shard folders: no crash, no hang, no growth over 512 MB, no code executed.

    PYTHONPATH=. python tests/soak/mutations.py --rounds 10000 [--seed 0] [--reads audio samples ...]

Each round damages one audio file or one shard folder and sends it through all that reads such things: packer, decoders,
reader, stream, verification, webdataset. Half of the folders are signed anew after the damage, so that the hashes do
not stop everything at the door. Our own errors are what should come; any other exception is a failure, shown with its
round. The rounds run in a process of their own, which this one watches. Prints a summary as JSON; exit code 1 on a
failure.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import soundfile

from mellow_ds.config.schema import DataConfig
from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.data.audio import AudioError, decode_clip, decode_window
from mellow_ds.data.reader import ShardReader
from mellow_ds.data.webdataset import as_webdataset
from mellow_ds.errors import MellowError
from mellow_ds.packing.decode import BadClip, pack_clip
from mellow_ds.packing.verify import verify_shards
from mellow_ds.shard_format import INDEX_DTYPE, MANIFEST_NAME, index_name, sample_checksum
from mellow_ds.world import World
from tests.data.made_shards import RATE, CharTokenizer, make_layout, simple_clips, write_shards

EXPECTED = (MellowError, AudioError, BadClip)
ROUND_SECONDS = 30  # of one round; they take some milliseconds
MAX_GROWTH_MB = 512
MAX_SHOWN = 10  # failures that are shown whole
READS = ("audio", "samples", "stream", "verify", "webdataset")
FORBIDDEN = {"os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen"} | {
    "pickle.find_class"
}
FORMS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")] + [
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_24"),
    ("W64", "PCM_16"),
    ("AU", "ULAW"),
]


class MakesMarker:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Mutator:
    """Draws damage; the same seed gives the same."""

    def __init__(self, seed: int, work: Path) -> None:
        self.draw = random.Random(seed)
        self.work = work
        self.poison = pickle.dumps(MakesMarker(work / "marker"))
        self.audio = [_sound(form, subtype) for form, subtype in FORMS]
        self.folders = [
            write_shards(work / f"good-{codec}", [simple_clips(0, 3), simple_clips(1, 2)], codec)
            for codec in ("flac", "pcm")
        ]

    def bytes_of(self, content: bytes) -> bytes:
        """`content` with something wrong in it."""
        damaged = bytearray(content)
        for _ in range(self.draw.choice((1, 1, 2, 5))):
            if damaged:
                self.draw.choice((self._flip, self._number, self._cut, self._repeat, self._insert, self._zero))(damaged)
        return bytes(damaged)

    def _place(self, content: bytearray) -> int:
        # headers are where damage hurts
        return self.draw.randrange(min(len(content), self.draw.choice((64, 512, len(content)))))

    def _flip(self, content: bytearray) -> None:
        for _ in range(self.draw.choice((1, 4, 30))):
            content[self._place(content)] = self.draw.randrange(256)

    def _number(self, content: bytearray) -> None:
        """A number that a header may hold, at its most inconvenient."""
        width = self.draw.choice((1, 2, 3, 4, 8))
        value = self.draw.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1))
        place = self._place(content)
        content[place : place + width] = value.to_bytes(width, self.draw.choice(("little", "big")))

    def _cut(self, content: bytearray) -> None:
        del content[self.draw.randrange(len(content)) :]

    def _repeat(self, content: bytearray) -> None:
        place = self._place(content)
        content[place:place] = content[place : place + self.draw.choice((1, 512, 5000))]

    def _insert(self, content: bytearray) -> None:
        place = self._place(content)
        content[place:place] = self.draw.choice((self.draw.randbytes(self.draw.randrange(1, 600)), self.poison))

    def _zero(self, content: bytearray) -> None:
        place, length = self._place(content), self.draw.choice((1, 16, 600))
        content[place : place + length] = bytes(len(content[place : place + length]))

    def folder(self) -> Path:
        """A damaged copy of a shard folder."""
        folder = self.work / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.draw.choice(self.folders), folder)
        paths = sorted(folder.iterdir())
        for _ in range(self.draw.choice((1, 1, 1, 3))):
            path = self.draw.choice(paths)
            path.write_bytes(self.bytes_of(path.read_bytes()))
        if self.draw.random() < 0.7:
            _sign(folder, with_checksums=self.draw.random() < 0.6)
        return folder


def _sound(form: str, subtype: str) -> bytes:
    rate = 48_000 if subtype == "OPUS" else 16_000
    wave = 0.5 * np.sin(np.arange(rate // 8) / 9)
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave, wave[::-1]], 1), rate, format=form, subtype=subtype)
    return file.getvalue()


def _sign(folder: Path, with_checksums: bool) -> None:
    """Make manifest and, if asked, index checksums fit the files as they are; leaves what cannot be read as it is."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text())
        for shard in content["shards"]:
            tar, index = folder / shard["name"], folder / index_name(shard["name"])
            if with_checksums:
                _fit_checksums(tar.read_bytes(), index)
            shard["num_bytes"] = tar.stat().st_size
            shard["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
            shard["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
        (folder / MANIFEST_NAME).write_text(json.dumps(content))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return


def _fit_checksums(tar: bytes, index: Path) -> None:
    try:
        rows = np.load(index, allow_pickle=False)
    except Exception:  # the index itself is what is damaged
        return
    if getattr(rows, "dtype", None) != INDEX_DTYPE:
        return
    for row in rows:
        parts = [tar[int(row[f"{p}_offset"]) :][: int(row[f"{p}_bytes"])] for p in ("audio", "json")]
        row["checksum"] = sample_checksum(*parts)
    np.save(index, rows)


def reads_of_audio(payload: bytes) -> list[Callable[[], object]]:
    """All that reads an audio file."""
    out = np.empty(400, dtype=np.float32)
    windows = [partial(decode_window, memoryview(payload), RATE, n, 0, out) for n in (0, 1000, 2000, 2**32 - 1)]
    return [
        partial(pack_clip, payload, RATE, "flac"),
        *windows,
        partial(decode_clip, memoryview(payload), 16_000, 2000),
    ]


def reads_of_folder(folder: Path, wanted: Sequence[str]) -> list[Callable[[], object]]:
    """All that reads a shard folder, of what is wanted."""
    reads = {
        "samples": lambda: _read_samples(folder),
        "stream": lambda: _read_stream(folder),
        "verify": lambda: verify_shards(folder),
        "webdataset": lambda: list(as_webdataset(folder)),
    }
    return [reads[name] for name in wanted if name in reads]


def _read_samples(folder: Path) -> None:
    reader = ShardReader([folder], RATE)
    for shard in range(len(reader.shards)):
        for row in range(min(reader.num_samples(shard), 20)):
            with contextlib.suppress(MellowError):
                sample = reader.sample(shard, row)
                for question in sample.info.questions:
                    reader.rows_of(shard, question, sample, row)
                decode_clip(sample.audio, RATE, sample.num_frames)
        with contextlib.suppress(MellowError):
            list(reader.infos(shard))


def _read_stream(folder: Path) -> None:
    from mellow_ds.data.stream import TrainStream  # torch: not in the process that watches

    data = DataConfig(sampling_rate=RATE, segment_seconds=0.05, max_bad_fraction=1.0)
    train = TrainConfig(batch_size=3, global_batch_size=6, num_workers=0)
    with TrainStream(
        ShardReader([folder], RATE), CharTokenizer(), make_layout(), data, train, World(), end_step=2
    ) as s:
        list(s)


class Hang(Exception):
    """A round took too long."""


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise Hang(f"more than {ROUND_SECONDS} s")


def watch_for_code(events: list[str]) -> None:
    """Note every start of a process and everything that is unpickled, from here on."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            events.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)


def work(rounds: int, seed: int, wanted: Sequence[str], folder: Path) -> dict[str, Any]:
    """All rounds, in this process; what came of them."""
    logging.disable()
    mutator, outcomes, failures, events = Mutator(seed, folder), Counter[str](), list[str](), list[str]()
    for good in mutator.folders:  # imports, caches and pools of memory are no growth
        for read in [
            *reads_of_folder(good, READS),
            *(read for sound in mutator.audio for read in reads_of_audio(sound)),
        ]:
            with contextlib.suppress(*EXPECTED):
                read()
    signal.signal(signal.SIGALRM, _too_long)
    watch_for_code(events)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(rounds):
        (folder / "round").write_text(str(number))
        if number % 2 or "audio" not in wanted:
            reads, kind = reads_of_folder(mutator.folder(), wanted), "folder"
        else:
            reads, kind = reads_of_audio(mutator.bytes_of(mutator.draw.choice(mutator.audio))), "audio"
        for read in reads:
            outcome = _outcome(read)
            if outcome in ("taken", "refused"):
                outcomes[f"{kind} {outcome}"] += 1
            else:
                failures.append(f"round {number}: {outcome}")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if growth > MAX_GROWTH_MB:
        failures.append(f"memory grew by {growth:.0f} MB")
    if (folder / "marker").exists() or events:
        failures.append(f"code was executed, or a process started: {events[:5]}")
    return {"rounds": rounds, "seed": seed, **outcomes, "growth_mb": round(growth, 1), "failures": failures}


def _outcome(read: Callable[[], object]) -> str:
    """ "taken", "refused", or what went wrong."""
    signal.alarm(ROUND_SECONDS)
    try:
        read()
        return "taken"
    except EXPECTED as error:
        return "refused" if "\n" not in str(error) else f"an error of several lines: {error}"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)


def watch(rounds: int, seed: int, wanted: Sequence[str], folder: Path) -> int:
    """Run `work` in a process of its own; exit code 1 where it failed, crashed or hung."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--rounds", str(rounds), "--seed", str(seed), "--work", str(folder)]
    log = (folder / "log").open("wb")  # decoders talk a lot about bad files
    process = subprocess.Popen([*command, "--reads", *wanted], stdout=subprocess.PIPE, stderr=log, text=True)
    mark, changed, out = "", time.monotonic(), ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, _ = process.communicate(timeout=1)
            break
        found = (folder / "round").read_text() if (folder / "round").exists() else ""
        if found != mark:
            mark, changed = found, time.monotonic()
        elif time.monotonic() - changed > 4 * ROUND_SECONDS:  # a loop in C, which no alarm ends
            process.kill()
    where = (folder / "round").read_text() if (folder / "round").exists() else "none"
    if process.returncode != 0:
        print(f"round {where} of seed {seed} ended the process with code {process.returncode}", file=sys.stderr)
        print((folder / "log").read_text(errors="replace")[-2000:], file=sys.stderr)
        return 1
    result = json.loads(out.splitlines()[-1])
    for failure in result["failures"][:MAX_SHOWN]:
        print(failure, file=sys.stderr)
    result.update(failures=len(result["failures"]), seconds=round(time.monotonic() - started, 1))
    print(json.dumps(result))
    return 1 if result["failures"] else 0


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # given: this is the process that is watched
    parser.add_argument("--reads", nargs="+", choices=READS, default=READS, help="what reads; all of it unless given")
    arguments = parser.parse_args()
    if arguments.work is not None:
        print(json.dumps(work(arguments.rounds, arguments.seed, arguments.reads, arguments.work)))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        return watch(arguments.rounds, arguments.seed, arguments.reads, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
