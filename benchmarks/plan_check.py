"""The model behind `mellow-shards plan` against the real stream: examples a second and time to the first batch.

Small shards are built for each codec; a bare loop over `BatchBuilder` measures what an example costs on one core; then
the real `TrainStream` is read with 0, 1 and 2 loader processes, each in a process of its own, as a trainer would, by
a consumer that does nothing. Beside what is measured stands what the plan says: from that cost, and from the rates that
it ships with (mellow_ds/packing/planning/rates.py). The files are in the page cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring

EXAMPLES = """examples:
  python benchmarks/plan_check.py --out benchmarks/results/plan_check.json
  python benchmarks/plan_check.py --tiny --rounds 1        does it run? (under a minute)
"""
RATE = 32_000  # Hz
TEXTS = "texts"  # shards of clips of 10 ms: what an example costs besides its audio
LOCAL_DISK = 1e6  # MB/s: everything is in the page cache


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here (benchmarks/results/NAME.json)")
    parser.add_argument("--rounds", type=measuring.positive, default=2, help="rounds (default 2)")
    parser.add_argument("--batch-size", type=measuring.positive, default=8, help="examples (default 8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of reading for each measurement (default 5)")
    parser.add_argument("--clips", type=measuring.positive, default=96, help="clips of 10 s (default 96)")
    parser.add_argument("--codecs", nargs="+", default=["flac", "pcm", "opus"], help="(default: flac pcm opus)")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--tiny", action="store_true", help="short clips: shows that it runs, measures nothing")
    parser.add_argument("--seed", type=int, default=0, help="of the sounds (default 0)")
    parser.add_argument("--child", nargs=2, metavar=("DIR", "WORKERS"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def build_corpus(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Shards of each codec, and of nearly nothing but texts: codec -> folder."""
    from mellow_ds.packing.build import build_shards

    seconds = 0.5 if options.tiny else 10.0
    num_clips = 16 if options.tiny else options.clips
    write_sounds(folder / "long", num_clips, seconds, options.seed)
    write_sounds(folder / "short", num_clips, 0.01, options.seed)
    records = folder / "records.json"
    records.write_text(json.dumps(made_records(num_clips)), encoding="utf-8")
    found = {}
    for name in [*options.codecs, TEXTS]:
        source, codec = (folder / "short", "pcm") if name == TEXTS else (folder / "long", name)
        found[name] = folder / name
        build_shards([records], source, found[name], codec=codec, workers=1, shard_megabytes=num_clips * seconds / 160)
    return found


def write_sounds(folder: Path, num_clips: int, seconds: float, seed: int) -> None:
    """Clips of noise whose spectrum falls like that of everyday sound, so that FLAC has as much to do."""
    import numpy as np
    import soundfile

    folder.mkdir(parents=True)
    for number in range(num_clips):
        draw = np.random.default_rng((seed, number))
        spectrum = np.fft.rfft(draw.standard_normal(round(seconds * RATE)))
        wave = np.fft.irfft(spectrum / np.sqrt(1 + np.arange(len(spectrum)) / (len(spectrum) / 40)))
        soundfile.write(folder / f"{number}.wav", 0.5 * wave / np.abs(wave).max(), RATE, subtype="PCM_16")


def made_records(num_clips: int) -> list[dict[str, Any]]:
    """Five questions a clip, one of them about the next clip, too: 1.2 clips a question."""
    prompt = "which of these sounds is heard first in the recording? a) a bell b) a siren c) a dog d) rain"
    records = []
    for number in range(num_clips):
        for asked in range(4):
            answer = f"b) a siren, and then sound number {number} of kind {asked} until the end"
            records.append({"clips": [f"{number}.wav"], "input": f"{prompt} ({asked})", "answer": answer})
        pair = [f"{number}.wav", f"{(number + 1) % num_clips}.wav"]
        records.append(
            {"clips": pair, "input": "explain the difference in a sentence", "answer": f"{number} is louder"}
        )
    return records


def run_child(folder: Path, workers: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure in a process of its own; `workers` -1: the bare loop."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder), str(workers)]
    command += ["--batch-size", str(options.batch_size), "--seconds", str(options.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise SystemExit(f"plan_check: a measurement failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    # what else ran: with more than the cores can do, wall times are those of a shared machine
    return {**found, "load_average": os.getloadavg()[0]}


def measure_child(folder: Path, workers: int, batch_size: int, seconds: float) -> dict[str, float]:
    """Read one folder for some seconds; runs in the process of its own."""
    import torch

    from mellow_ds.config.schema import DataConfig
    from mellow_ds.config.train_keys import TrainConfig
    from mellow_ds.data.corpus import iterate_texts
    from mellow_ds.data.reader import ShardReader
    from mellow_ds.data.stream import TrainStream
    from mellow_ds.model.tokenizer import train_tokenizer
    from mellow_ds.prompt import Layout
    from mellow_ds.world import World

    torch.set_num_threads(1)
    tokenizer = train_tokenizer(iterate_texts(ShardReader([folder], RATE)), 2048)
    layout = Layout(audio_tokens=33, separator_id=0, end_id=0, max_prompt_tokens=129, max_answer_tokens=250)
    train = TrainConfig(batch_size=batch_size, num_workers=max(workers, 0))
    start = time.perf_counter()
    reader = ShardReader([folder], RATE)  # again: it is part of a start
    if workers < 0:
        return bare_loop(reader, tokenizer, layout, DataConfig(), batch_size, seconds)
    with TrainStream(reader, tokenizer, layout, DataConfig(), train, World()) as stream:
        next(stream)
        first = time.perf_counter() - start
        warm_until = time.perf_counter() + seconds / 5  # past what was prepared while the first batch was waited for
        while time.perf_counter() < warm_until:
            next(stream)
        num_examples, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            num_examples += next(stream).stats.num_examples
        return {"first_batch_seconds": first, "examples_per_second": num_examples / (time.perf_counter() - begun)}


def bare_loop(reader: Any, tokenizer: Any, layout: Any, data: Any, batch_size: int, seconds: float) -> dict[str, float]:
    """CPU seconds of an example from shard to batch tensors, without a stream."""
    from mellow_ds.data.examples import BatchBuilder
    from mellow_ds.data.order import Order, examples_of_step, steps_per_epoch

    builder = BatchBuilder(reader, tokenizer, layout, data.clip_samples, seed=1)
    order = Order(reader.num_questions, seed=1)
    steps, num_examples, step = steps_per_epoch(order.num_examples, batch_size), 0, 0
    builder.build(examples_of_step(order, batch_size, 0, 0))
    begun, wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < seconds:
        epoch, step_in_epoch = divmod(step, steps)
        places = examples_of_step(order, batch_size, epoch, step_in_epoch)
        num_examples += builder.build(places).stats.num_examples
        step += 1
    return {"cpu_seconds": (time.process_time() - begun) / num_examples}


def predict(folder: Path, codec: str, workers: int, batch_size: int, rate: float) -> dict[str, float]:
    """What the plan says; `rate` examples a CPU-second, 0: the rates that it ships with."""
    from mellow_ds.packing.planning.plan import Cluster, Demand, corpus_of_folder, make_plan

    corpus, _ = corpus_of_folder(folder)
    cluster = Cluster(workers=workers, disk=LOCAL_DISK)
    plan = make_plan(corpus, cluster, Demand(1e9, batch_size, codec=codec, examples_per_cpu_second=rate))
    return {
        "examples_per_second": plan.bottleneck.examples_per_second,
        "first_batch_seconds": plan.first_batch_seconds,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; what goes into the result file besides its context."""
    with tempfile.TemporaryDirectory() as name:
        folders = build_corpus(Path(name), options)
        cost: dict[str, list[float]] = {codec: [] for codec in folders}
        found: dict[tuple[str, int], list[dict[str, float]]] = {
            (codec, workers): [] for codec in options.codecs for workers in options.workers
        }
        for number in range(options.rounds):
            for codec, folder in folders.items():
                cost[codec].append(run_child(folder, -1, options)["cpu_seconds"])
            for codec, workers in found:
                found[codec, workers].append(run_child(folders[codec], workers, options))
            print(f"round {number + 1} of {options.rounds} is done", file=sys.stderr, flush=True)
        rows = []
        for (codec, workers), values in found.items():
            median = {key: statistics.median(value[key] for value in values) for key in values[0]}
            rate = 1 / statistics.median(cost[codec])
            rows.append(
                {
                    "codec": codec,
                    "workers": workers,
                    "measured": median,
                    "rounds": values,
                    "predicted_from_cost": predict(folders[codec], codec, workers, options.batch_size, rate),
                    "predicted_as_shipped": predict(folders[codec], codec, workers, options.batch_size, 0),
                }
            )
    return {
        "batch_size": options.batch_size,
        "clips": options.clips,
        "seconds": options.seconds,
        "cpu_seconds_an_example": cost,
        "rows": rows,
    }


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Measured beside predicted."""
    table = []
    for row in rows:
        own, cost, shipped = row["measured"], row["predicted_from_cost"], row["predicted_as_shipped"]
        cells = [f"{part['examples_per_second']:.0f}" for part in (own, cost, shipped)]
        cells.append(f"{own['examples_per_second'] / cost['examples_per_second']:.2f}")
        cells += [f"{part['first_batch_seconds']:.1f}" for part in (own, cost)]
        table.append([f"{row['codec']}, {row['workers']} workers", *cells])
    header = [
        "stream",
        "examples/s",
        "predicted",
        "(as shipped)",
        "measured by predicted",
        "first batch s",
        "predicted",
    ]
    measuring.print_table(header, table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the result."""
    options = parse_arguments(arguments)
    if options.child:
        folder, workers = Path(options.child[0]), int(options.child[1])
        print(json.dumps(measure_child(folder, workers, options.batch_size, options.seconds)))
        return
    if options.tiny:
        options.seconds = min(options.seconds, 0.5)
    result = measure(options)
    for codec, values in result["cpu_seconds_an_example"].items():
        print(f"{codec}: {1e3 * statistics.median(values):.3f} ms of CPU an example")
    print_rows(result["rows"])
    if options.out:
        about = measuring.context("plan_check.py", sys.argv[1:] if arguments is None else arguments, 1)
        measuring.write_result(options.out, {"benchmark": "plan_check", **about, **result})


if __name__ == "__main__":
    main()
