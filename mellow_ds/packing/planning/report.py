"""A plan as text for the terminal and as JSON."""

from typing import Any

from mellow_ds.packing.planning.plan import GIGABYTE, MEGABYTE, Plan


def format_plan(plan: Plan) -> str:
    """Several lines, ending without a line break."""
    corpus, cluster, demand = plan.corpus, plan.cluster, plan.demand
    where = f"{cluster.network:,.0f} MB/s of network" if cluster.network else "shards on their disks"
    rows = [
        (
            "corpus",
            f"{corpus.num_clips:,} clips of {corpus.mean_seconds:.1f} s, {corpus.num_questions:,} questions of "
            f"{corpus.clips_per_question:.2f} clips",
        ),
        (
            "cluster",
            f"{cluster.nodes} x {cluster.gpus} GPUs, {cluster.workers} loader processes each; a node: "
            f"{cluster.disk:,.0f} MB/s of disk, {where}",
        ),
        (
            "shards",
            f"{plan.num_shards:,} of {_gb(plan.shard_bytes)} ({demand.codec}), {_gb(plan.total_bytes)}",
        ),
        ("in use at a time", f"{plan.working_shards:,} shards a node, {_gb(plan.working_shards * plan.shard_bytes)}"),
    ]
    if cluster.network:
        rows += [
            ("cache a node", f"at least {_gb(plan.cache_bytes)}; {_gb(plan.total_bytes)} to download only once"),
            ("download an epoch", f"{_gb(plan.epoch_download_bytes)} a node"),
        ]
    parts = ", ".join(f"{name} {_seconds(value)}" for name, value in plan.first_batch.items() if value >= 0.05)
    rows += [("first batch after", f"{_seconds(plan.first_batch_seconds)}" + (f" ({parts})" if parts else ""))]
    rows += [("a GPU takes", f"{demand.examples_per_second:,.0f} examples/s")]
    for supply in plan.supplies:
        rows.append((f"  {supply.name}", f"{supply.examples_per_second:,.0f} examples/s a GPU ({supply.meaning})"))
    rows.append(("GPUs busy", _verdict(plan)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if plan.advice:
        lines += ["", "to change, one of:", *(f"  {line}" for line in plan.advice)]
    return "\n".join(lines)


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; rates in examples a second and GPU, sizes in bytes, times in seconds."""
    return {
        "corpus": {**vars(plan.corpus), "num_questions": plan.corpus.num_questions},
        "cluster": vars(plan.cluster),
        "demand": vars(plan.demand),
        "shard_bytes": round(plan.shard_bytes),
        "num_shards": plan.num_shards,
        "total_bytes": round(plan.total_bytes),
        "working_shards_a_node": plan.working_shards,
        "first_shards_a_node": plan.first_shards,
        "cache_bytes_a_node": round(plan.cache_bytes),
        "epoch_download_bytes_a_node": round(plan.epoch_download_bytes),
        "cpu_seconds_an_example": plan.cpu_seconds,
        "first_batch_seconds": plan.first_batch_seconds,
        "first_batch_parts": plan.first_batch,
        "supplies": [vars(supply) for supply in plan.supplies],
        "bottleneck": plan.bottleneck.name,
        "busy_share": plan.busy_share,
        "advice": list(plan.advice),
    }


def _verdict(plan: Plan) -> str:
    worst = plan.bottleneck
    share = plan.busy_share
    if not plan.cluster.workers:
        return f"{share:.0%}: without loader processes, loading and computing take turns"
    times = worst.examples_per_second / plan.demand.examples_per_second
    if share < 1:
        return f"no, {share:.0%} of the time: {worst.name} give{'' if worst.name.endswith('es') else 's'} too little"
    return f"yes; the least that is given is {times:.1f} times what they take ({worst.name})"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GIGABYTE:,.1f} GB" if num_bytes >= GIGABYTE else f"{num_bytes / MEGABYTE:,.1f} MB"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 600 else f"{value / 60:,.0f} min"
