"""Clips a second through `mellow-shards build` and through a bare loop of decoding, resampling and encoding; one core.

The build reads each file twice (once to hash it, once to pack it), reads and places the questions, hashes, writes and
syncs tars and indexes. The bare loop reads, decodes, resamples and encodes each file and keeps nothing. Both do it in
this process, held to one core, in turns. The corpus is made by formula: noise of falling spectrum at 44.1 kHz.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measuring

BARE, BUILD = "bare loop", "build"
QUESTIONS_A_CLIP = 18  # ReasonAQA: 968,071 questions over 52,499 clips
SOURCE_RATE, STORED_RATE = 44_100, 32_000  # Hz
EXAMPLES = """examples:
  python benchmarks/pack.py --out benchmarks/results/pack.json
  python benchmarks/pack.py --clips 4 --rounds 2          does it run? (seconds)
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here (benchmarks/results/NAME.json)")
    parser.add_argument("--rounds", type=measuring.positive, default=7, help="rounds (default 7)")
    parser.add_argument("--clips", type=measuring.positive, default=120, help="clips of the corpus (default 120)")
    parser.add_argument("--clip-seconds", type=float, default=10.0, help="length of a clip (default 10)")
    parser.add_argument("--codec", choices=("flac", "pcm", "opus"), default="flac", help="(default flac)")
    parser.add_argument("--folder", type=Path, help="work below this folder (default: the system's temporary one)")
    return parser.parse_args(arguments)


def make_corpus(folder: Path, num_clips: int, clip_seconds: float) -> Path:
    """Audio files and a JSON file of questions, a part of them about two clips; returns the JSON file."""
    import numpy as np
    import soundfile

    (folder / "audio").mkdir(parents=True)
    records = []
    for number in range(num_clips):
        draw = np.random.default_rng(number)
        spectrum = np.fft.rfft(draw.standard_normal(round(clip_seconds * SOURCE_RATE)))
        wave = np.fft.irfft(spectrum / np.sqrt(1 + np.arange(len(spectrum))))  # 3 dB an octave, as everyday sound
        soundfile.write(folder / "audio" / f"{number}.wav", 0.5 * wave / np.abs(wave).max(), SOURCE_RATE)
        for question in range(QUESTIONS_A_CLIP):
            partner = f"{number ^ 1}.wav" if question % 5 == 0 and number ^ 1 < num_clips else ""
            text = f"question {question} about clip {number}: " + "which of these sounds is heard first? " * 3
            records.append({"filepath1": f"{number}.wav", "filepath2": partner, "input": text, "answer": "a) a bell"})
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def bare_loop(paths: Sequence[Path], codec: str) -> None:
    """Read, decode, resample and encode each file, in the plainest way."""
    import io

    import numpy as np
    import soundfile
    import torch
    from torchaudio.transforms import Resample

    kind = {"flac": ("FLAC", "PCM_16"), "pcm": ("WAV", "PCM_16"), "opus": ("OGG", "OPUS")}[codec]
    rate = 48_000 if codec == "opus" else STORED_RATE
    resample = Resample(SOURCE_RATE, rate)
    for path in paths:
        samples, _ = soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32")
        with torch.no_grad():
            resampled = resample(torch.from_numpy(samples)).numpy()
        whole = np.clip(np.rint(resampled * 32768.0), -32768, 32767).astype(np.int16)
        soundfile.write(io.BytesIO(), whole, rate, format=kind[0], subtype=kind[1])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the rounds; what goes into the result file besides its context."""
    import torch

    from mellow_ds.packing.build import run_build
    from mellow_ds.packing.settings import BuildSettings

    torch.set_num_threads(1)
    records = make_corpus(folder, options.clips, options.clip_seconds)
    paths = sorted((folder / "audio").iterdir())
    settings = BuildSettings(codec=options.codec, workers=1, max_rejected=0, overwrite=True)
    cpu_seconds: dict[str, list[float]] = {BARE: [], BUILD: []}
    stored = []

    def build(number: int) -> None:
        report = run_build([records], folder / "audio", folder / f"out-{number}", settings)
        assert not report.was_finished
        stored.append(report.num_stored)

    runs: dict[str, Callable[[int], None]] = {BARE: lambda _: bare_loop(paths, options.codec), BUILD: build}

    def run(name: str) -> Callable[[int], float]:
        def timed(number: int) -> float:
            before = time.process_time()
            seconds = measuring.timed(lambda: runs[name](number))
            cpu_seconds[name].append(time.process_time() - before)
            return seconds

        return timed

    for first in runs.values():  # imports, filters and the page cache
        first(-1)
    seconds = measuring.take_turns({name: run(name) for name in runs}, options.rounds)
    assert set(stored) == {options.clips}, "a clip is copied, so the two do not do the same"
    return {
        "num_clips": options.clips,
        "clip_seconds": options.clip_seconds,
        "num_questions": options.clips * QUESTIONS_A_CLIP,
        "codec": options.codec,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "clips_per_second": {name: options.clips / statistics.median(values) for name, values in seconds.items()},
        "clips_per_cpu_second": {
            name: options.clips / statistics.median(values) for name, values in cpu_seconds.items()
        },
        "share_of_bare_rate": _median_ratio(seconds),
        "share_of_bare_rate_by_cpu_seconds": _median_ratio(cpu_seconds),
    }


def _median_ratio(seconds: dict[str, list[float]]) -> float:
    """The median over the rounds of the rate of the build by that of the bare loop."""
    return statistics.median(bare / build for bare, build in zip(seconds[BARE], seconds[BUILD], strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the result."""
    options = parse_arguments(arguments)
    sys.path.insert(0, str(measuring.ROOT))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, Path(folder))
    print(f"packing as {options.codec}, {options.clips} clips of {options.clip_seconds:g} s, {options.rounds} rounds")
    rates, cpu_rates = result["clips_per_second"], result["clips_per_cpu_second"]
    rows = [[name, f"{rates[name]:.2f}", f"{cpu_rates[name]:.2f}"] for name in rates]
    rows.append(
        [
            "build / bare loop",
            f"{result['share_of_bare_rate']:.2f}",
            f"{result['share_of_bare_rate_by_cpu_seconds']:.2f}",
        ]
    )
    measuring.print_table(["variant", "clips a second", "clips a CPU second"], rows)
    if options.out:
        about = measuring.context("pack.py", sys.argv[1:] if arguments is None else arguments, threads=1)
        measuring.write_result(options.out, {"benchmark": "pack", **about, **result})


if __name__ == "__main__":
    main()
