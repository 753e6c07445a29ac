"""How well the order mixes, by window and number of runs: nothing is timed, the order itself is counted.

Shards of a real corpus hold what belongs together (a data set, a recording session), so a batch should be drawn from
many of them, and two batches that follow each other from different ones. Both are compared with drawing at random from
the whole corpus:

    python benchmarks/shuffle_quality.py
    python benchmarks/shuffle_quality.py --shards 400 --questions 7000 --batch 512
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measuring

from mellow_ds.data.order import Order, examples_of_step, steps_per_epoch

_STEPS = 200  # looked at, evenly spaced over the epoch


def main() -> None:
    """Count, print the table and write the result."""
    options = _parse()
    sizes = np.random.default_rng(0).normal(options.questions, 0.1 * options.questions, options.shards)
    rows = []
    for runs in (1, 8, 64, 256):
        for window in (1, 2, 4, 8, 16):
            order = Order(tuple(int(n) for n in sizes), seed=1, window_shards=window, num_runs=runs)
            rows.append({"order_runs": runs, "shuffle_window": window, **quality(order, options.batch)})
    random = random_quality(options.shards, options.batch)
    header = ["runs", "window", "shards in a batch", "examples whose shard the next batch has too"]
    table = [[r["order_runs"], r["shuffle_window"], *_shown(r)] for r in rows]
    measuring.print_table(header, [*([str(cell) for cell in row] for row in table), ["at random", "", *_shown(random)]])
    about = {"shards": options.shards, "questions_a_shard": options.questions, "global_batch_size": options.batch}
    context = measuring.context("shuffle_quality.py", sys.argv[1:], threads=1)
    measuring.write_result(options.out, {**context, **about, "at_random": random, "rows": rows})


def _shown(row: Any) -> list[str]:
    return [f"{row['shards_in_a_batch']:.1f}", f"{row['shared_with_next']:.2f}"]


def quality(order: Order, batch: int) -> dict[str, float]:
    """Different shards in a batch, and the share of a batch's examples whose shard the next batch has too."""
    num_steps = steps_per_epoch(order.num_examples, batch)
    shards, shared = [], []
    for step in np.linspace(0, num_steps - 3, _STEPS).astype(int).tolist():
        first, second = (examples_of_step(order, batch, 0, step + n)[:, 0] for n in range(2))
        shards.append(len(np.unique(first)))
        shared.append(float(np.isin(first, second).mean()))
    return {"shards_in_a_batch": float(np.mean(shards)), "shared_with_next": float(np.mean(shared))}


def random_quality(num_shards: int, batch: int) -> dict[str, float]:
    """The same for examples drawn at random, in closed form: shards of equal size."""
    missed = (1 - 1 / num_shards) ** batch
    return {"shards_in_a_batch": num_shards * (1 - missed), "shared_with_next": 1 - missed}


def _parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=135, help="default: 135, 34 GB of 256 MB")
    parser.add_argument("--questions", type=int, default=7170, help="of a shard on average (default: 7170)")
    parser.add_argument("--batch", type=int, default=128, help="global batch size (default: 128)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shuffle_quality.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
