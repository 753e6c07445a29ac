"""The benchmark of the engine layer: its bare loops take the steps of the engine, and its shares are of pairs."""

import engine_overhead
import pytest

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.verify.processes import run_ranks
from mellow_ds.world import World


def test_the_share_is_the_median_of_the_rounds_ratios() -> None:
    seconds = {
        "bare DeepSpeed": [1.0, 2.0, 4.0], "engine over DeepSpeed": [1.1, 2.1, 4.0],
        "bare FSDP2": [1.0, 1.0, 1.0], "engine over FSDP2": [0.9, 1.0, 5.0],
    }  # fmt: skip
    assert engine_overhead.shares(seconds) == pytest.approx({"DeepSpeed ZeRO-2": 0.05, "FSDP2": 0.0})


def losses_of_four_ways(world: World) -> dict[str, list[float]]:
    config = TrainConfig(learning_rate=1e-2, max_grad_norm=1.0)
    found = {}
    for name, build in {
        "engine over DeepSpeed": lambda model: engine_overhead.engine_step(world, model, "deepspeed", 2, config),
        "bare DeepSpeed": lambda model: engine_overhead.bare_deepspeed_step(world, model, config),
        "engine over FSDP2": lambda model: engine_overhead.engine_step(world, model, "fsdp", 3, config),
        "bare FSDP2": lambda model: engine_overhead.bare_fsdp_step(world, model, config),
    }.items():
        model = engine_overhead.build_model(1, True)
        batches = engine_overhead.build_batches(model, world.rank)
        step = build(model)
        found[name] = [step(batches[number % 2]) for number in range(3)]
    return found


@pytest.mark.slow
def test_all_four_take_the_same_steps() -> None:
    """On two ranks with as many answer tokens each, where the mean of means is the mean."""
    one, other = run_ranks(2, losses_of_four_ways)
    bare = {name: [(a + b) / 2 for a, b in zip(one[name], other[name], strict=True)] for name in one}
    wanted = one["engine over DeepSpeed"]
    assert wanted[0] > wanted[2] + 0.05
    for name, losses in bare.items():
        assert losses == pytest.approx(wanted, rel=1e-5), name
