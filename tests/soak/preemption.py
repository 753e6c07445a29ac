"""Runs that are asked to stop at random moments: the right exit code each time, and how soon the state is saved.

    PYTHONPATH=. python tests/soak/preemption.py --rounds 50 [--seed 0]

A round starts the real command on a tiny model, on one rank or two, saving after every third step or after every step,
in the background or not, and sends SIGTERM, SIGUSR1 or SIGINT to one rank or to all at a random moment. Every rank must
end with 85 (130 after SIGINT); the newest checkpoint must be whole and that of the last recorded step. Prints a summary
as JSON with the seconds from the signal to the published checkpoint and to the end; exit code 1 on a difference.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mellow_ds.checkpoint.files_list import verify_checkpoint
from mellow_ds.checkpoint.retention import published_steps
from mellow_ds.checkpoint.step_folder import step_of
from mellow_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from mellow_ds.monitor.metrics import read_metrics
from tests.cli.runs import TINY, started

MOST_DELAY = 0.5  # seconds after the first record
END_SECONDS = 60
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def one_round(shards: Path, run: Path, number: int, draw: random.Random) -> tuple[str, float, float]:
    """(what was done, seconds to the checkpoint, seconds to the end of all ranks)."""
    num_ranks = 1 + number % 2
    sent = draw.choice(SIGNALS)
    every, is_async = draw.choice((1, 3)), draw.choice((True, False))
    to = [draw.randrange(num_ranks)] if draw.random() < 0.5 else list(range(num_ranks))
    arguments = [
        "--config", "quickstart", "--data.shards", shards, "--save-dir", run, *TINY, "--train.max_steps", 100_000,
        "--train.save_every_steps", every, "--train.async_save", str(is_async).lower(),
    ]  # fmt: skip
    metrics = run / "metrics.jsonl"
    with started("train.py", *arguments, num_ranks=num_ranks) as ranks:
        ranks[0].wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        time.sleep(draw.random() * MOST_DELAY)
        for rank in to:
            os.kill(ranks[rank].pid, sent)
        clock, begun = time.time(), time.monotonic()
        done = [rank.end(begun + END_SECONDS) for rank in ranks]
        to_end = time.monotonic() - begun
    codes = [rank.returncode for rank in done]
    expected = EXIT_INTERRUPTED if sent == signal.SIGINT else EXIT_STOPPED
    what = f"{sent.name} to rank {to} of {num_ranks}, saving every {every}, async {is_async}"
    assert codes == [expected] * num_ranks, f"{what}: codes {codes}\n{done[0].stderr[-2000:]}"
    newest = published_steps(run / "checkpoints")[-1]
    verify_checkpoint(newest)
    last = [record["step"] for record in read_metrics(metrics) if record["kind"] == "step"][-1]
    assert step_of(newest) == last, f"{what}: the newest is {newest.name}, the last step {last}"
    return f"{sent.name} on {num_ranks}", max(newest.stat().st_ctime - clock, 0.0), to_end


def main() -> int:
    """Read the arguments and run."""
    from mellow_ds.packing.build import build_shards
    from mellow_ds.packing.synthesis.corpus import synthesize

    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, began, kinds = random.Random(options.seed), time.monotonic(), Counter[str]()
    to_save, to_end = [], []
    with tempfile.TemporaryDirectory(prefix="preemption-") as name:
        folder = Path(name)
        synthesize(folder / "corpus", {"train": 16}, seed=3, audio_format="wav", workers=1)
        build_shards([folder / "corpus" / "train.json"], folder / "corpus", folder / "train")
        for number in range(options.rounds):
            kind, saved, ended = one_round(folder / "train", folder / f"run-{number}", number, draw)
            kinds[kind] += 1
            to_save.append(saved)
            to_end.append(ended)
    summary = {
        "rounds": options.rounds,
        "seed": options.seed,
        "right_codes": sum(kinds.values()),
        "seconds_to_checkpoint_median": round(statistics.median(to_save), 2),
        "seconds_to_checkpoint_most": round(max(to_save), 2),
        "seconds_to_end_most": round(max(to_end), 2),
        **kinds,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
