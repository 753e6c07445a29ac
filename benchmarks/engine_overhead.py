"""What the engine layer costs: a step of it beside a bare DeepSpeed loop and a bare FSDP2 loop, on the same model.

Two ranks over gloo, a thread each. All four take turns in one run, on the same batches; a step is forward, backward,
clipping, update and the loss as a number. The engine layer adds what the bare loops lack: the loss over all answer
tokens of all ranks, counts, skipped steps, BatchNorm statistics.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measuring

EXAMPLES = """examples:
  python benchmarks/engine_overhead.py --out benchmarks/results/engine_overhead.json      # 5 minutes on 2 cores
  python benchmarks/engine_overhead.py --tiny --rounds 2       does it run? (a minute)
"""
PAIRS = {"DeepSpeed ZeRO-2": ("bare DeepSpeed", "engine over DeepSpeed"), "FSDP2": ("bare FSDP2", "engine over FSDP2")}
MOST_SHARE = 0.03
BATCH_SIZE = 4
NUM_BATCHES = 4


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result here (benchmarks/results/NAME.json)")
    parser.add_argument("--rounds", type=measuring.positive, default=30, help="rounds (default 30)")
    parser.add_argument("--layers", type=measuring.positive, default=4, help="of the decoder (default 4)")
    parser.add_argument("--tiny", action="store_true", help="a minute network: shows that it runs, measures nothing")
    return parser.parse_args(arguments)


def build_model(layers: int, tiny: bool) -> Any:
    """A narrow frozen Cnn14 and a Llama of SmolLM2-135M's width with fewer layers and words."""
    import torch

    from mellow_ds.model.configuration import MellowConfig, MellowEncoderConfig
    from mellow_ds.model.modeling import MellowForConditionalGeneration

    torch.manual_seed(0)
    encoder = MellowEncoderConfig(
        kind="Cnn14", clip_samples=32_000, channels=(8, 16, 32), out_emb=32, num_classes=5, audio_tokens=0
    )
    width = 48 if tiny else 576
    text = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers,
        "num_attention_heads": 3 if tiny else 9, "num_key_value_heads": 3, "vocab_size": 100 if tiny else 8192,
        "tie_word_embeddings": True,
    }  # fmt: skip
    model = MellowForConditionalGeneration(
        MellowConfig(encoder_config=encoder, text_config=text, projector_dropout=0.0)
    )
    model.set_trainable(("projector", "decoder"))
    return model.train()


def build_batches(model: Any, rank: int) -> list[Any]:
    """Noise and tokens: one clip, a prompt of 40 and an answer of 24 tokens an example."""
    import torch

    from mellow_ds.data.batch import IGNORE_INDEX, Batch

    draw = torch.Generator().manual_seed(rank)
    audio, rows = model.num_audio_tokens, torch.arange(BATCH_SIZE)
    batches = []
    for _ in range(NUM_BATCHES):
        ids = torch.randint(1, model.config.text_config.vocab_size, (BATCH_SIZE, audio + 1 + 64), generator=draw)
        labels = ids.clone()
        labels[:, :-24] = IGNORE_INDEX
        clips = torch.randn(BATCH_SIZE, 32_000, generator=draw) * 0.1
        start = torch.zeros(BATCH_SIZE, dtype=torch.long)
        names = tuple(map(str, rows.tolist()))
        batches.append(Batch(clips, ids, torch.ones_like(ids), labels, rows, start, rows, names))
    return batches


def engine_step(world: Any, model: Any, kind: str, stage: int, config: Any) -> Callable[[Any], float]:
    """(batch) -> loss, by the engine layer."""
    import torch

    from mellow_ds.engine.build import build_engine

    engine = build_engine(kind, model, engine_json(stage), step_shape(world, config), config, torch.device("cpu"))
    return lambda batch: engine.train_step([batch], config.learning_rate, config.max_grad_norm).loss


def engine_json(stage: int) -> dict[str, Any]:
    """As in ds_configs."""
    section: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    return {"zero_optimization": {**section, **({"use_multi_rank_bucket_allreduce": False} if stage == 2 else {})}}


def step_shape(world: Any, config: Any) -> Any:
    """Of a step of one micro-batch."""
    from mellow_ds.ds_config import StepShape

    return StepShape(
        world.size, BATCH_SIZE, 1, config.max_grad_norm, config.learning_rate, config.weight_decay, "float32"
    )


def bare_deepspeed_step(world: Any, model: Any, config: Any) -> Callable[[Any], float]:
    """(batch) -> loss of this rank, as DeepSpeed's own examples write it."""
    import deepspeed

    from mellow_ds.ds_config import resolve_engine_json

    resolved = resolve_engine_json(engine_json(2), step_shape(world, config))
    engine, *_ = deepspeed.initialize(model=model, optimizer=bare_optimizer(model, config), config=resolved)

    def step(batch: Any) -> float:
        loss = engine(**batch.model_inputs()).loss
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


def bare_fsdp_step(world: Any, model: Any, config: Any) -> Callable[[Any], float]:
    """(batch) -> loss of this rank, as torch's own examples write it; sharded where the engine shards."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, frozen = init_device_mesh("cpu", (world.size,)), set(model.encoder.parameters())
    for block in [model.projector, *model.decoder.model.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    optimizer = bare_optimizer(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(batch: Any) -> float:
        loss = model(**batch.model_inputs()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def bare_optimizer(model: Any, config: Any) -> Any:
    """torch's fused AdamW with the engine's groups."""
    from mellow_ds.engine.optimizer import parameter_groups, torch_optimizer

    return torch_optimizer(parameter_groups(model, config), config)[0]


def measure_on_rank(world: Any, rounds: int, layers: int, tiny: bool) -> dict[str, Any]:
    """Seconds of every step by variant, wall clock and CPU of this rank; the first step of each is not counted."""
    import torch.distributed as dist

    from mellow_ds.config.train_keys import TrainConfig

    config = TrainConfig(learning_rate=1e-4, max_grad_norm=1.0)
    models = [build_model(layers, tiny) for _ in range(4)]
    batches = build_batches(models[0], world.rank)
    steps = {
        "engine over DeepSpeed": engine_step(world, models[0], "deepspeed", 2, config),
        "bare DeepSpeed": bare_deepspeed_step(world, models[1], config),
        "engine over FSDP2": engine_step(world, models[2], "fsdp", 3, config),
        "bare FSDP2": bare_fsdp_step(world, models[3], config),
    }
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        # every second round the other way round, so that none always comes after the same one
        for name in list(steps) if number % 2 else reversed(list(steps)):
            dist.barrier()
            started, cpu_started = time.perf_counter(), time.process_time()
            losses[name].append(steps[name](batches[number % NUM_BATCHES]))
            if number:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - cpu_started)
    num_parameters = sum(p.numel() for p in build_model(layers, tiny).parameters() if p.requires_grad)
    return {"num_trained": num_parameters, "wall_seconds": wall, "cpu_seconds": cpu, "losses": losses}


def shares(seconds: dict[str, list[float]]) -> dict[str, float]:
    """What the engine layer adds, as a share of the bare step: the median over the rounds of the ratio, less 1."""
    return {
        name: statistics.median(own / bare for own, bare in zip(seconds[engine], seconds[loop], strict=True)) - 1
        for name, (loop, engine) in PAIRS.items()
    }


def added_milliseconds(cpu: dict[str, list[float]]) -> dict[str, float]:
    """Of CPU time, on a network so small that little else is in a step: the difference of the medians."""
    return {
        name: 1000 * (statistics.median(cpu[engine]) - statistics.median(cpu[loop]))
        for name, (loop, engine) in PAIRS.items()
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    options = parse_arguments(arguments)
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    from mellow_ds.verify.processes import run_ranks

    minute = run_ranks(2, measure_on_rank, 3 * options.rounds, 1, True, seconds=600)[0]["cpu_seconds"]
    by_rank = run_ranks(2, measure_on_rank, options.rounds, options.layers, options.tiny, seconds=1500)
    wall, cpu = by_rank[0]["wall_seconds"], by_rank[0]["cpu_seconds"]
    wall_shares, cpu_shares, milliseconds = shares(wall), shares(cpu), added_milliseconds(minute)
    rows = [
        [
            name, f"{statistics.median(wall[loop]):.3f}", f"{statistics.median(wall[engine]):.3f}",
            f"{100 * wall_shares[name]:+.1f} %", f"{100 * cpu_shares[name]:+.1f} %", f"{milliseconds[name]:+.1f}",
        ]
        for name, (loop, engine) in PAIRS.items()
    ]  # fmt: skip
    print(f"a step of {by_rank[0]['num_trained'] / 1e6:.1f} M trained parameters on 2 ranks, {options.rounds} rounds")
    measuring.print_table(
        ("", "bare, s", "engine, s", "added (wall)", "added (CPU)", "minute network: added ms of CPU"), rows
    )
    if options.out:
        facts = measuring.context("engine_overhead.py", arguments, threads=1)
        facts["versions"]["deepspeed"] = version("deepspeed")
        measuring.write_result(
            options.out,
            {
                "benchmark": "engine_overhead", **facts, "rounds": options.rounds, "layers": options.layers,
                "added_wall": wall_shares, "added_cpu": cpu_shares, "added_milliseconds": milliseconds,
                "by_rank": by_rank, "minute_network_cpu_seconds": minute,
            },
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
