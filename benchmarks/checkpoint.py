"""How long a checkpoint holds up training, waited for and in the background, and how soon a run goes on from one.

The recipe `mellow` in full size (167 M parameters, random weights), float32, on CPU ranks. Saves: rounds of
steps without a save, a save that is waited for, and a save in the background with steps beside it. Resuming: the real
command, from the start of its process to the first step that it records.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import psutil

EXAMPLES = """examples:
  python benchmarks/checkpoint.py --out benchmarks/results/checkpoint.json      # 3 minutes on 2 cores
  python benchmarks/checkpoint.py --engine fsdp --stage 3 --out benchmarks/results/checkpoint_fsdp3.json
  python benchmarks/checkpoint.py --tiny --rounds 1 --steps 2                   # does it run?
"""
_RESUME_SECONDS = 300  # that a start may take before it counts as failed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here (benchmarks/results/NAME.json)")
    parser.add_argument("--rounds", type=measuring.positive, default=3, help="rounds (default 3)")
    parser.add_argument("--steps", type=measuring.positive, default=6, help="steps beside a save (default 6)")
    parser.add_argument("--ranks", type=measuring.positive, default=2, help="processes (default 2)")
    parser.add_argument("--engine", choices=("deepspeed", "fsdp"), default="deepspeed", help="back end (deepspeed)")
    parser.add_argument("--stage", type=int, choices=range(4), default=2, help="of ZeRO or FSDP2 (default 2)")
    parser.add_argument("--layers", type=measuring.positive, help="layers of the decoder (default 30, as SmolLM2-135M)")
    parser.add_argument("--tiny", action="store_true", help="minute networks: shows that it runs, measures nothing")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (default 0)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Saves, then resumes; what goes into the result file besides its context."""
    saves = measure_saves(options, folder / "saves")
    resumes = measure_resumes(options, folder)
    return {**saves, **summarise(saves["rounds"]), "resume_seconds": resumes, "resume_longest": max(resumes)}


def measure_saves(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds of steps and saves on `options.ranks` processes."""
    from checkpoint_ranks import run_rank

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=run_rank, args=(rank, port, folder, options, results)) for rank in range(options.ranks)
    ]
    for rank in ranks:
        rank.start()
    found: dict[str, Any] = results.get()
    for rank in ranks:
        rank.join()
    return found


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of what a save costs, and the ratio of the two ways.

    `slowed`: by how much the steps beside a background save were longer than those of the same round without one; on
    CPU ranks that have all the cores, writing takes time from them.
    """
    waited = [r["synchronous_save"] for r in rounds]
    blocked = [r["asynchronous_save"] for r in rounds]
    slowed = [sum(r["steps_beside_it"]) - sum(r["steps"]) for r in rounds]
    both = [b + max(s, 0.0) + r["left_after_them"] for b, s, r in zip(blocked, slowed, rounds, strict=True)]
    return {
        "median_synchronous": statistics.median(waited),
        "median_asynchronous": statistics.median(blocked),
        "median_slowed": statistics.median(slowed),
        "share": statistics.median(b / w for b, w in zip(blocked, waited, strict=True)),
        "share_with_slowed_steps": statistics.median(b / w for b, w in zip(both, waited, strict=True)),
    }


def measure_resumes(options: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds from the start of the real command to its first step, when it goes on from a checkpoint."""
    run = folder / "run"
    arguments = [*run_arguments(options, folder), "--save-dir", str(run)]
    done = subprocess.run(command(options, *arguments, "--train.stop_at_step", "1"), env=environment(), check=False)
    if done.returncode:
        sys.exit(f"the run to go on from ended with {done.returncode}")
    return [_resume_once(command(options, *arguments), run / "metrics.jsonl") for _ in range(options.rounds)]


def run_arguments(options: argparse.Namespace, folder: Path) -> list[str]:
    """A training run of the recipe's sizes without weights from a hub, on a few made-up sounds."""
    from project_side import choose_sizes, recipe_config

    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    corpus = folder / "corpus"
    synthesize(corpus, {"train": 8}, seed=3, audio_format="wav", workers=1)
    build_shards([corpus / "train.json"], corpus, folder / "shards")
    sizes = choose_sizes(options.tiny, options.layers)
    save_decoder(folder / "decoder", json.loads((corpus / "train.json").read_text()), vars(sizes))
    # a tiny Cnn14 stands for HTSAT
    tiny = "--model.encoder.audioenc_name Cnn14 --model.encoder.channels 4 8 --model.encoder.out_emb 8"
    tiny += " --model.encoder.freeze_audio_encoder_weights false"
    return [
        "--config", "mellow", "--engine", options.engine,
        "--deepspeed_config", str(measuring.engine_json(options.stage)),
        "--data.shards", str(folder / "shards"),
        "--data.segment_seconds", str(recipe_config(sizes).data.segment_seconds),
        "--model.decoder.text_decoder", str(folder / "decoder"), "--train.batch_size", "1", "--train.num_workers", "0",
        "--train.log_every_steps", "1", "--train.max_steps", "50", "--train.save_every_steps", "0",
        "--model.encoder.d_proj", str(sizes.hidden_size), *(tiny.split() if options.tiny else []),
    ]  # fmt: skip


def save_decoder(folder: Path, records: list[dict[str, Any]], sizes: dict[str, Any]) -> None:
    """A decoder of SmolLM2-135M's sizes with random weights, and a tokenizer of the records' words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mellow_ds.model.tokenizer import train_tokenizer

    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    tokenizer = train_tokenizer([f"{r['input']} {r['answer']}" for r in records], 256)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        **{name: sizes[name] for name in names}, vocab_size=sizes["vocab_size"], tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def command(options: argparse.Namespace, *arguments: str) -> list[str]:
    """train.py on the ranks, by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
    return [*launcher, "--master-port", str(free_port()), str(measuring.ROOT / "train.py"), *arguments]


def environment() -> dict[str, str]:
    """One thread a rank; no hub."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(measuring.ROOT)}


def _resume_once(resumed: list[str], metrics: Path) -> float:
    before = metrics.stat().st_size
    started = time.perf_counter()
    process = subprocess.Popen(resumed, env=environment(), cwd=measuring.ROOT)
    try:
        while metrics.stat().st_size <= before or b'"step": 2' not in metrics.read_bytes():
            if process.poll() is not None or time.perf_counter() - started > _RESUME_SECONDS:
                sys.exit("the resumed run came to no step")
            time.sleep(0.05)
        return time.perf_counter() - started
    finally:
        # the ranks too: left to themselves they would save when their launcher has gone
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in family:
            member.kill()
        psutil.wait_procs(family[:-1])
        process.wait()
        metrics.write_bytes(metrics.read_bytes()[:before])


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the result."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-") as name:
        result = measure(options, Path(name))
    print(result["engine"])
    print(f"{result['num_parameters'] / 1e6:.0f} M parameters, {result['num_bytes'] / 1e6:.0f} MB a checkpoint")
    rows = {
        "training held up by a save that is waited for": result["median_synchronous"],
        "training held up by a save in the background": result["median_asynchronous"],
        "steps beside it longer by, all together": result["median_slowed"],
        "start of the process to the first step of a resumed run": statistics.median(result["resume_seconds"]),
    }
    measuring.print_table(("", "seconds"), [[name, f"{seconds:.2f}"] for name, seconds in rows.items()])
    shares = [round(100 * result[name]) for name in ("share", "share_with_slowed_steps")]
    print("held up in the background, percent of waited for: {}; with the longer steps: {}".format(*shares))
    if options.out:
        facts = measuring.context("checkpoint.py", given, 1)
        measuring.write_result(options.out, {"benchmark": "checkpoint", **facts, **result})


if __name__ == "__main__":
    main()
