"""Examples a CPU-second, from shard to batch tensors, against reading a WAV for every question as the original does.

Every way makes the same thing on one core: batches of examples about two clips of 10 s each, texts left out on both
sides (a stand-in tokenizer gives fixed ids). The corpus is made by formula. All ways take turns:

    python benchmarks/data_stream.py
    python benchmarks/data_stream.py --clips 40 --rounds 2 --batches 4

Also measured: the bytes of a shard read sample by sample against reading the file front to back; a plain webdataset
pipeline over the same feature tar; the time to the first batch by number of shards and by step.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measuring

SOURCE_RATE, RATE, SECONDS = 44_100, 32_000, 10.0  # Hz, Hz, of a clip
QUESTIONS_A_CLIP = 22  # as in ReasonAQA
EMBEDDINGS, POSTERIORS = (1, 768), (32, 527)  # of HTSAT
GOALS = {"FLAC": 2.2, "PCM": 30, "features": 200}


def main() -> None:
    """Make the corpus, let the ways take turns, print the table and write the result."""
    options = _parse()
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="data-stream-", dir=options.folder))
    try:
        result = measure(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    context = measuring.context("data_stream.py", sys.argv[1:], threads=1)
    measuring.write_result(options.out, {**context, **result})


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """All measurements, on a corpus made in `folder`."""
    records = make_corpus(folder, options.clips)
    shards = make_shards(folder, options)
    ways = {
        "WAV": original_way(records, folder, options.batch_size),
        "FLAC": stream_way(shards["flac"], options.batch_size),
        "PCM": stream_way(shards["pcm"], options.batch_size),
        "Opus": stream_way(shards["opus"], options.batch_size),
        "features": stream_way(shards["features"], options.batch_size),
        "features, webdataset": webdataset_way(shards["features"], options.batch_size),
    }
    rates = examples_a_cpu_second(ways, options)
    for name, rate in rates.items():
        print(f"{name:<22}{rate:>10.1f} examples a CPU-second{rate / rates['WAV']:>8.1f} x WAV", flush=True)
    print(f"features against webdataset: {rates['features'] / rates['features, webdataset']:.2f} x")
    raw = {name: raw_rate(shards[name], options.rounds) for name in ("flac", "pcm")}
    for name, ratio in raw.items():
        print(f"bytes of {name} sample by sample: {ratio:.2f} of the rate of reading the file front to back")
    starts = time_to_first_batch(folder, options)
    for name, seconds in starts.items():
        print(f"first batch, {name}: {seconds:.3f} s")
    return {
        "clips": options.clips,
        "batch_size": options.batch_size,
        "examples_a_cpu_second": rates,
        "times_wav": {name: rate / rates["WAV"] for name, rate in rates.items()},
        "features_times_webdataset": rates["features"] / rates["features, webdataset"],
        "raw_reading": raw,
        "seconds_to_first_batch": starts,
        "goals": GOALS,
    }


def make_corpus(folder: Path, num_clips: int) -> list[dict[str, Any]]:
    """Stereo WAV files of band-limited noise with a tone, and questions about pairs of neighbours."""
    random = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for number in range(num_clips):
        noise = random.normal(size=(round(SECONDS * SOURCE_RATE), 2)).cumsum(axis=0)
        noise -= noise.mean(axis=0) + np.linspace(-1, 1, len(noise))[:, None] * (noise[-1] - noise[0]) / 2
        tone = np.sin(np.arange(len(noise)) * (200 + 50 * number) * 2 * np.pi / SOURCE_RATE)[:, None]
        wave = 0.3 * noise / np.abs(noise).max() + 0.3 * tone + 0.005 * random.normal(size=noise.shape)
        soundfile.write(folder / "audio" / f"{number}.wav", wave, SOURCE_RATE, subtype="PCM_16")
    texts = {"caption1": "a tone over noise", "caption2": "another tone over noise", "taskname": "pair"}
    records = [
        {
            "filepath1": f"{number}.wav",
            "filepath2": f"{(number + 1) % num_clips}.wav",
            "input": f"question {question} about how the tones of the two recordings and their noise differ?",
            "answer": f"the second tone is higher by {50 + question} Hz and the noise is a little louder",
            "subtype": "difference",
            **texts,
        }
        for number in range(num_clips)
        for question in range(QUESTIONS_A_CLIP)
    ]
    (folder / "pairs.json").write_text(json.dumps(records))
    return records


def make_shards(folder: Path, options: Any) -> dict[str, Path]:
    """A folder of shards by codec. Features are random numbers in HTSAT's shapes: reading does not depend on them."""
    from mellow_ds.packing.build import build_shards

    found = {}
    for codec in ("flac", "pcm", "opus"):
        found[codec] = folder / codec
        build_shards([folder / "pairs.json"], folder / "audio", found[codec], codec=codec, workers=options.workers)
    found["features"] = folder / "features"
    write_features(found["pcm"], found["features"])
    return found


def write_features(audio: Path, out: Path) -> None:
    """Feature shards with the clips and questions of the shards in `audio`."""
    from mellow_ds.data.reader import ShardReader
    from mellow_ds.packing.shard_file import write_samples
    from mellow_ds.shard_format import FEATURES, FEATURES_EXTENSION, MANIFEST_NAME, FeatureInfo

    random = np.random.default_rng(1)
    size = EMBEDDINGS[0] * EMBEDDINGS[1] + POSTERIORS[0] * POSTERIORS[1]
    reader = ShardReader([audio], RATE)
    out.mkdir()
    shards = []
    for number, (_, shard) in enumerate(reader.shards):
        infos = list(reader.infos(number))
        samples = ((info, random.random(size, dtype=np.float32).astype("<f2").tobytes()) for info in infos)
        shards.append(write_samples(out, shard.name, FEATURES_EXTENSION, samples, len(infos)))
    features = FeatureInfo("0" * 32, "random numbers", round(SECONDS * RATE), EMBEDDINGS, POSTERIORS, 1)
    manifest = replace(reader.manifests[0], codec=FEATURES, features=features, shards=tuple(shards))
    (out / MANIFEST_NAME).write_text(manifest.to_json())


class FixedIds:
    """In place of a tokenizer: the same ids for every text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """16 ids."""
        del text, add_special_tokens
        return {"input_ids": list(range(1, 17))}


def original_way(records: list[dict[str, Any]], folder: Path, batch_size: int) -> Callable[[int], None]:
    """Read, mix down, resample and pad both clips of each question, then stack."""
    import torch
    from torchaudio.transforms import Resample

    resample = Resample(SOURCE_RATE, RATE)
    window = round(SECONDS * RATE)

    def clip(name: str) -> torch.Tensor:
        samples, _ = soundfile.read(folder / "audio" / name, dtype="float32", always_2d=True)
        mono = resample(torch.from_numpy(samples).mean(dim=1))
        return torch.nn.functional.pad(mono[:window], (0, max(window - len(mono), 0)))

    def run(number: int) -> None:
        chosen = np.random.default_rng(number).integers(0, len(records), batch_size)
        pairs = [(clip(records[i]["filepath1"]), clip(records[i]["filepath2"])) for i in chosen]
        first, second = (torch.stack([pair[place] for pair in pairs]) for place in range(2))
        assert first.shape == second.shape == (batch_size, window)

    return run


def stream_way(folder: Path, batch_size: int) -> Callable[[int], None]:
    """The project's: what a loader process does for a micro-batch of the training order."""
    from mellow_ds.data.examples import BatchBuilder
    from mellow_ds.data.order import Order, examples_of_step
    from mellow_ds.data.reader import ShardReader
    from mellow_ds.prompt import Layout

    reader = ShardReader([folder], RATE)
    layout = Layout(audio_tokens=33, separator_id=0, end_id=0, max_prompt_tokens=129, max_answer_tokens=250)
    builder = BatchBuilder(reader, FixedIds(), layout, round(SECONDS * RATE), seed=1)
    order = Order(reader.num_questions, seed=1)

    def run(number: int) -> None:
        places = examples_of_step(order, batch_size, 0, number % (order.num_examples // batch_size))
        batch = builder.build(places).batch
        assert batch.num_examples == batch_size

    return run


def webdataset_way(folder: Path, batch_size: int) -> Callable[[int], None]:
    """A plain webdataset pipeline over the same tars: decode both members, two samples an example, stack."""
    import torch
    import webdataset

    size = EMBEDDINGS[0] * EMBEDDINGS[1]

    def decode(sample: dict[str, Any]) -> tuple[Any, Any]:
        numbers = np.frombuffer(sample["f16"], dtype="<f2")
        question = json.loads(sample["json"])["questions"][0]
        ids = [FixedIds()(question[name])["input_ids"] for name in ("input", "answer")]
        return numbers, ids

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = iter(webdataset.WebDataset(urls, shardshuffle=False).shuffle(100).map(decode).repeat())

    def run(_: int) -> None:
        pairs = [next(samples) for _ in range(2 * batch_size)]
        whole = torch.from_numpy(np.stack([numbers for numbers, _ in pairs]))
        embeddings, posteriors = whole[:, :size], whole[:, size:].reshape(-1, *POSTERIORS)
        rows = torch.tensor([ids[0] + ids[1] for _, ids in pairs[::2]])
        assert len(embeddings) == len(posteriors) == 2 * len(rows) == 2 * batch_size

    return run


def examples_a_cpu_second(ways: dict[str, Callable[[int], None]], options: Any) -> dict[str, float]:
    """Medians over rounds in which the ways take turns; fast ways make more batches in their turn."""
    batches = {name: 1 if name == "WAV" else options.batches for name in ways}
    for name, run in ways.items():
        seconds = min(_cpu_seconds(run, number, 1) for number in range(2))
        batches[name] = max(1, round(options.seconds / max(seconds, 1e-4)))
    turns = {name: (lambda n, r=run, k=batches[name]: _cpu_seconds(r, 1 + n * k, k)) for name, run in ways.items()}
    seconds = measuring.take_turns(turns, options.rounds)
    return {name: batches[name] * options.batch_size / float(np.median(values)) for name, values in seconds.items()}


def _cpu_seconds(run: Callable[[int], None], first: int, number: int) -> float:
    started = time.process_time()
    for place in range(first, first + number):
        run(place)
    return time.process_time() - started


def raw_rate(folder: Path, rounds: int) -> float:
    """Rate of reading every sample of the shards once, checked but not decoded, over that of reading the files."""
    from mellow_ds.data.reader import ShardReader

    reader = ShardReader([folder], RATE)
    paths = sorted(folder.glob("*.tar"))

    def by_sample(_: int) -> float:
        def run() -> None:
            for shard in range(len(reader.shards)):
                for row in range(reader.num_samples(shard)):
                    assert reader.sample(shard, row).num_bytes

        return measuring.timed(run)

    def front_to_back(_: int) -> float:
        def run() -> None:
            for path in paths:
                with path.open("rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass

        return measuring.timed(run)

    by_sample(0), front_to_back(0)  # the page cache is warm from here on
    seconds = measuring.take_turns({"by sample": by_sample, "front to back": front_to_back}, max(rounds, 5))
    return float(np.median(seconds["front to back"]) / np.median(seconds["by sample"]))


def time_to_first_batch(folder: Path, options: Any) -> dict[str, float]:
    """Seconds from opening the shards to the first batch: 10 and 10,000 shards, step 0 and step 1,000,000."""
    found = {}
    for num_shards in (10, options.many_shards):
        many = copy_shards(folder / "features", folder / f"many-{num_shards}", num_shards)
        for step in (0, 1_000_000):
            seconds = [measuring.timed(lambda s=step, f=many: first_batch(f, s)) for _ in range(3)]
            found[f"{num_shards:,} shards, step {step:,}"] = float(np.median(seconds))
        shutil.rmtree(many)
    return found


def copy_shards(source: Path, out: Path, number: int) -> Path:
    """A folder of `number` shards that are names of the first of `source`."""
    from mellow_ds.shard_format import MANIFEST_NAME, index_name, read_manifest

    manifest = read_manifest(source)
    first = manifest.shards[0]
    out.mkdir()
    shards = []
    for place in range(number):
        name = f"shard-{place:06d}.tar"
        os.link(source / first.name, out / name)
        os.link(source / index_name(first.name), out / index_name(name))
        shards.append(replace(first, name=name))
    text = replace(manifest, shards=tuple(shards), num_questions=first.num_questions * number).to_json()
    (out / MANIFEST_NAME).write_text(text)
    return out


def first_batch(folder: Path, step: int) -> None:
    """Open the shards and take the batch of `step` out of a training stream."""
    from mellow_ds.config.schema import DataConfig
    from mellow_ds.config.train_keys import TrainConfig
    from mellow_ds.data.reader import ShardReader
    from mellow_ds.data.stream import TrainStream
    from mellow_ds.prompt import Layout
    from mellow_ds.world import World

    layout = Layout(audio_tokens=33, separator_id=0, end_id=0, max_prompt_tokens=129, max_answer_tokens=250)
    data, train = DataConfig(sampling_rate=RATE), TrainConfig(batch_size=16, global_batch_size=16, num_workers=0)
    stream = TrainStream(ShardReader([folder], RATE), FixedIds(), layout, data, train, World(), start_step=step)
    with stream:
        assert next(stream).step == step


def _parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result = measuring.ROOT / "benchmarks" / "results" / "data_stream.json"
    parser.add_argument("--out", type=Path, default=result, metavar="FILE", help=f"default: {result.name} in results/")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where the corpus is made and removed (default: TMP)"
    )
    parser.add_argument("--clips", type=measuring.positive, default=120, help="of 10 s (default: 120, 210 MB as WAV)")
    parser.add_argument("--rounds", type=measuring.positive, default=5, help="default: 5")
    parser.add_argument("--batches", type=measuring.positive, default=1, help="least batches of a turn (default: 1)")
    parser.add_argument("--batch-size", type=measuring.positive, default=32, help="examples (default: 32)")
    parser.add_argument("--seconds", type=float, default=1.0, help="CPU-seconds of a turn, about (default: 1)")
    parser.add_argument("--workers", type=measuring.positive, default=2, help="processes that pack (default: 2)")
    parser.add_argument("--many-shards", type=measuring.positive, default=10_000, help="default: 10000")
    return parser.parse_args()


if __name__ == "__main__":
    main()
