"""The plan's arithmetic: held against the order itself, and against cases done by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mellow_ds.data.order import Order, examples_of_rank, examples_of_step
from mellow_ds.errors import PackingError
from mellow_ds.packing.build import build_shards
from mellow_ds.packing.planning import rates as plan_rates
from mellow_ds.packing.planning.plan import (
    Cluster,
    CorpusSize,
    Demand,
    Plan,
    corpus_of_folder,
    cpu_seconds,
    make_plan,
    transfer_seconds,
)
from mellow_ds.packing.planning.report import format_plan, plan_as_json

REASONAQA = CorpusSize(num_clips=52_499, mean_seconds=11, questions_per_clip=18.4)


def planned(cluster: dict[str, Any] | None = None, corpus: CorpusSize = REASONAQA, **demand: Any) -> Plan:
    given = {"examples_per_second": 500, **demand}
    return make_plan(corpus, Cluster(**(cluster or {})), Demand(**given))


@pytest.mark.parametrize("nodes", [1, 2, 8, 100])
@pytest.mark.parametrize("num_shards", [3, 40, 400])
@pytest.mark.parametrize("runs", [4, 64])
def test_the_shards_that_a_node_touches_are_those_of_the_order(nodes: int, num_shards: int, runs: int) -> None:
    order = Order((500,) * num_shards, seed=3, window_shards=4, num_runs=runs)
    batch = 8 * nodes
    corpus = CorpusSize(num_shards * 50, 10, 10, num_shards=num_shards, stored_bytes=num_shards * 1e8)
    plan = planned({"nodes": nodes}, corpus, batch_size=8, order_runs=runs)
    first, working = [], []
    for rank in range(0, nodes, max(nodes // 4, 1)):  # a node is a rank here: one GPU each
        steps = range(min(12, order.num_examples // batch))
        touched = [set(examples_of_rank(order, batch, 0, step, rank, nodes)[:, 0].tolist()) for step in steps]
        first += [len(shards) for shards in touched]
        working.append(len(set().union(*touched)))
    assert plan.num_shards == num_shards
    assert max(first) <= plan.first_shards + 4  # a slice may straddle two windows
    assert np.mean(first) == pytest.approx(plan.first_shards, abs=1)
    assert max(working) <= plan.working_shards + 4  # a run may come to its next window meanwhile


def test_a_step_of_one_node_touches_about_as_many_shards_as_said() -> None:
    order = Order((1000,) * 300, seed=0, window_shards=4, num_runs=64)
    corpus = CorpusSize(30_000, 10, 10, num_shards=300, stored_bytes=300e8)
    for batch in (16, 64, 512):
        found = np.mean([len(set(examples_of_step(order, batch, 0, step)[:, 0].tolist())) for step in range(20)])
        plan = planned(corpus=corpus, batch_size=batch)
        assert plan.first_shards == pytest.approx(found, rel=0.12)


def test_cpu_time_by_hand() -> None:
    # 1.2 clips of 10 s at FLAC's examples of 20 s a CPU-second, and the text
    rate = plan_rates.EXAMPLES_PER_CPU_SECOND["flac"]
    demand = Demand(1, codec="flac")
    assert cpu_seconds(REASONAQA, demand) == pytest.approx(1.2 * 10 / 20 / rate + plan_rates.TEXT_SECONDS)
    assert cpu_seconds(REASONAQA, Demand(1, codec="flac", segment_seconds=5)) == pytest.approx(
        1.2 * 5 / 20 / rate + plan_rates.TEXT_SECONDS
    )
    assert cpu_seconds(REASONAQA, Demand(1, batch_size=8, grouped=4)) == pytest.approx(
        0.3 * 10 / 20 / rate + plan_rates.TEXT_SECONDS
    )
    assert cpu_seconds(REASONAQA, Demand(1, examples_per_cpu_second=50)) == 1 / 50


def test_the_way_to_the_trainer_by_hand() -> None:
    # 1.2 windows of 10 s of 16 bits at 32 kHz, and an eighth of what a batch costs
    seconds = 1.2 * 0.64 * plan_rates.TRANSFER_SECONDS_A_MEGABYTE + plan_rates.TRANSFER_SECONDS_A_BATCH / 8
    assert transfer_seconds(REASONAQA, Demand(1, batch_size=8)) == pytest.approx(seconds)
    plans = [planned({"workers": workers}, batch_size=8) for workers in (0, 1)]
    assert plans[1].cpu_seconds - plans[0].cpu_seconds == pytest.approx(seconds)


def test_the_bottleneck_is_named_with_what_to_change() -> None:
    plan = planned({"workers": 2, "cores": 8}, examples_per_second=1000)
    assert plan.bottleneck.name == "loader processes"
    assert plan.busy_share == pytest.approx(2 / plan.cpu_seconds / 1000)
    assert any("--codec pcm" in line for line in plan.advice)
    plan = planned({"workers": 2, "cores": 64}, examples_per_second=1000)
    assert plan.advice[0].startswith(f"--train.num_workers {int(np.ceil(1200 * plan.cpu_seconds))} ")
    plan = planned({"workers": 99, "disk": 1, "memory": 0.001}, examples_per_second=1000)
    assert plan.bottleneck.name == "disk"
    assert "each clip anew" in plan.bottleneck.meaning
    plan = planned({"workers": 99, "network": 5, "gpus": 8}, examples_per_second=1000)
    assert plan.bottleneck.name == "network"
    assert any("data.cache_gigabytes 27" in line for line in plan.advice)
    plan = planned({"workers": 99}, examples_per_second=10)
    assert plan.busy_share == 1
    assert not plan.advice


def test_what_is_advised_is_enough() -> None:
    plan = planned({"workers": 1}, examples_per_second=900)
    workers = int(plan.advice[0].split()[1])
    assert planned({"workers": workers}, examples_per_second=900).busy_share == 1
    assert not planned({"workers": workers}, examples_per_second=900).advice


def test_without_loader_processes_loading_and_computing_take_turns() -> None:
    plan = planned({"workers": 0}, examples_per_cpu_second=100, examples_per_second=100)
    assert plan.busy_share == pytest.approx(0.5)
    assert plan.first_batch["starting loader processes"] == 0
    assert "take turns" in format_plan(plan)


def test_shards_are_as_large_as_the_first_batch_and_the_cache_allow() -> None:
    assert planned().shard_bytes == pytest.approx(256e6, rel=0.03)
    slow = planned({"network": 10, "nodes": 8, "workers": 8})
    assert slow.shard_bytes < 200e6
    assert slow.first_batch["shards arriving"] <= 60
    assert slow.first_batch["shards arriving"] == pytest.approx(slow.first_shards * slow.shard_bytes / 10e6)
    assert slow.cache_bytes <= 50e9
    assert planned({"network": 0.01}).shard_bytes == pytest.approx(16e6, rel=0.03)  # the smallest, and it says so
    assert any("first batch waits" in line for line in planned({"network": 0.01}).advice)
    assert planned(shard_megabytes=100).num_shards == int(np.ceil(planned().total_bytes / 100e6))


def test_an_existing_folder_is_taken_as_it_is(corpus: Any) -> None:
    corpus.ask_tones(8)
    out = corpus.folder / "out"
    manifest = build_shards([corpus.write()], corpus.root, out, workers=1, shard_megabytes=0.02)
    size, codec = corpus_of_folder(out)
    assert (size.num_clips, size.num_questions, size.num_shards, codec) == (8, 16, len(manifest.shards), "flac")
    assert size.clips_per_question == pytest.approx(1.5, abs=0.2)
    assert size.mean_seconds == pytest.approx(0.0535, abs=0.001)
    plan = planned(corpus=size)
    assert plan.total_bytes == sum(path.stat().st_size for path in Path(out).glob("*.tar"))
    assert plan.num_shards == len(manifest.shards)


def test_the_report_and_its_json_say_the_same() -> None:
    plan = planned({"nodes": 2, "gpus": 8, "network": 500}, codec="opus")
    content = plan_as_json(plan)
    text = format_plan(plan)
    assert f"{content['num_shards']:,} of" in text
    assert content["bottleneck"] == "loader processes"
    assert content["supplies"][0]["examples_per_second"] == plan.supplies[0].examples_per_second
    assert content["first_batch_seconds"] == pytest.approx(sum(content["first_batch_parts"].values()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CorpusSize(0, 10, 10),
        lambda: CorpusSize(10, 10, 10, clips_per_question=0.5),
        lambda: Cluster(nodes=0),
        lambda: Cluster(network=-1),
        lambda: Demand(0),
        lambda: Demand(1, codec="mp3"),
        lambda: Demand(1, shard_megabytes=-1),
    ],
)
def test_numbers_that_cannot_be_are_refused(make: Any) -> None:
    with pytest.raises(PackingError, match="--"):
        make()
