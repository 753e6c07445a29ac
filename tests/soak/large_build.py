"""Builds over the same clips with ever more questions: what memory their processes need at most.

    python tests/soak/large_build.py --records 968071 4000000 [--clips 52499] [--workers 2] [--seed 0] [--folder DIR]

Clips are a few samples of noise each, made once; records are made up, a fifth of them about two clips. Each build is
`mellow-shards build` in a process of its own, and the peaks (`VmHWM`) of it and of its largest worker are noted while
it runs. With --parts N the same records are also built in N parts, one after the other, and merged. Prints what it
found as JSON; exit code 1 where a build fails or counts other than the records that were made.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile

ROOT = Path(__file__).resolve().parent.parent.parent
REASON_AQA_RECORDS, REASON_AQA_CLIPS = 968_071, 52_499
PAIR_SHARE = 0.21  # of the records: 1,171,636 references to audio in 968,071 records
POLL_SECONDS = 0.2
MEGABYTE = 1e6


def make_clips(root: Path, count: int, seed: int) -> None:
    """`count` different audio files of 64 samples."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        path = root / clip_name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, draw.uniform(-0.5, 0.5, 64), 16_000)


def clip_name(number: int) -> str:
    """Path of a clip below the audio root, about as long as those of AudioCaps and Clotho."""
    return f"set-{number // 1000:03d}/recording of something {number:07d}.wav"


def make_records(path: Path, num_records: int, num_clips: int, seed: int) -> None:
    """A JSON list of records of about 500 bytes, in the order of nothing."""
    draw = random.Random(seed)
    words = [f"{draw.randrange(10**7):x}" for _ in range(2_000)]
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(2_000)]
    with path.open("w") as file:
        for number in range(num_records):
            second = clip_name(draw.randrange(num_clips)) if draw.random() < PAIR_SHARE else ""
            record = {
                "taskname": "made up",
                "filepath1": clip_name(number % num_clips),
                "filepath2": second,
                "caption1": draw.choice(texts),
                "caption2": draw.choice(texts) if second else "",
                "input": f"{draw.choice(texts)} a) {draw.choice(texts)} b) {draw.choice(texts)}",
                "answer": f"a) {number} {draw.choice(texts)}",
                "subtype": draw.choice(("mcq", "binary", "detail")),
            }
            file.write(("[" if not number else ",\n") + json.dumps(record))
        file.write("]")


class Peaks:
    """The highest memory of a process and of the largest of its children, seen while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.own_bytes = self.child_bytes = 0
        self._process = process
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while self._process.poll() is None:
            try:
                family = psutil.Process(self._process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                break
            self.own_bytes = max(self.own_bytes, peak_bytes(self._process.pid))
            self.child_bytes = max([self.child_bytes, *(peak_bytes(child.pid) for child in family)])
            time.sleep(POLL_SECONDS)

    def done(self) -> None:
        """Wait until the process has ended."""
        self._thread.join()


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had so far; 0 where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def run(*arguments: object) -> dict[str, Any]:
    """`mellow-shards` to its end: seconds and peaks of memory, in megabytes."""
    command = [sys.executable, "-m", "shards", *map(str, arguments)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = Peaks(process)
    assert process.stdout is not None
    printed = process.stdout.read()
    code = process.wait()
    peaks.done()
    if code:
        sys.exit(f"{' '.join(command)} ended with {code}:\n{printed}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_megabytes": round(peaks.own_bytes / MEGABYTE, 1),
        "worker_peak_megabytes": round(peaks.child_bytes / MEGABYTE, 1),
    }


def build(folder: Path, records: Path, options: argparse.Namespace, num_parts: int) -> dict[str, Any]:
    """Build and look at what came out."""
    out = folder / "out"
    given = ["--json", records, "--audio-root", folder / "audio", "--out", out, "--workers", options.workers]
    given += ["--max-rejected", 0, "--shard-megabytes", options.shard_megabytes]
    if not num_parts:
        found = run("build", *given)
    else:
        parts = [run("build", *given, "--num-parts", num_parts, "--part", part) for part in range(num_parts)]
        names = ("seconds", "peak_megabytes", "worker_peak_megabytes")
        largest = {f"part_{name}": max(part[name] for part in parts) for name in names}
        merged = run("merge", *sorted(out.glob("part-*")), "--out", out, "--method", "move")
        found = {"parts": num_parts, **largest, "merge_peak_megabytes": merged["peak_megabytes"]}
        found["merge_seconds"] = merged["seconds"]
    manifest = json.loads((out / "manifest.json").read_text())
    return {"questions": manifest["num_questions"], "clips": manifest["num_clips"], **found}


def main() -> None:
    """Make the corpus, build, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[REASON_AQA_RECORDS, 4_000_000])
    parser.add_argument("--clips", type=int, default=REASON_AQA_CLIPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", type=int, default=0)
    parser.add_argument("--shard-megabytes", type=float, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="work below this folder (default: the system's temporary one)")
    options = parser.parse_args()
    summary = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        make_clips(Path(name) / "audio", options.clips, options.seed)
        for num_records in options.records:
            records = Path(name) / "records.json"
            make_records(records, num_records, options.clips, options.seed)
            for num_parts in sorted({0, options.parts}):
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    (Path(folder) / "audio").symlink_to(Path(name) / "audio")
                    summary.append(build(Path(folder), records, options, num_parts))
                print(json.dumps(summary[-1]), file=sys.stderr, flush=True)
                if summary[-1]["questions"] != num_records:
                    sys.exit(f"{num_records} records were made, {summary[-1]['questions']} questions came out")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
