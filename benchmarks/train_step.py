"""Seconds of a train step: the original recipe, and the project with 33 and with 129 tokens a clip, side by side.

A step is forward, backward, clipping and the optimizer's update in float32 on CPUs. Every round brings new examples,
the same for all three. Reading and collating are not in it: they run in other processes.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import measuring
import workload

ORIGINAL = "original recipe"
EXAMPLES = """examples:
  python benchmarks/train_step.py --out benchmarks/results/train_step.json
  python benchmarks/train_step.py --tiny --rounds 2        does it run? (seconds)
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return measuring.comparison_parser(__doc__, EXAMPLES, rounds=5, batch_size=4).parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds; what goes into the result file besides its context."""
    import torch
    from project_side import (
        build_original,
        build_project_models,
        choose_sizes,
        count_parameters,
        draw_waveforms,
        recipe_config,
    )

    torch.set_num_threads(options.threads)
    sizes = choose_sizes(options.tiny, options.layers)
    models = build_project_models(sizes, options.seed)
    original = build_original(next(iter(models.values())))
    config = recipe_config(sizes)

    examples = workload.draw_examples(options.rounds * options.batch_size, options.seed, sizes.vocab_size)
    rounds = list(workload.batches(examples, options.batch_size))
    waveforms = draw_waveforms(options.batch_size, config.data.clip_samples, options.seed)
    steps = {ORIGINAL: original_step(original, config.train), **project_steps(models, config.train)}
    losses: dict[str, list[float]] = {name: [] for name in steps}

    def run(name: str) -> Callable[[int], float]:
        def step(number: int) -> float:
            prepared = steps[name](rounds[number], waveforms)
            return measuring.timed(lambda: losses[name].append(prepared()))

        return step

    for step in steps.values():
        step(rounds[0], waveforms)()  # the first step of each is slower: it allocates memory and optimizer state
    seconds = measuring.take_turns({name: run(name) for name in steps}, options.rounds)
    return {
        "batch_size": options.batch_size,
        "sizes": vars(sizes),
        "num_parameters": count_parameters(models),
        "workload": workload.describe(examples),
        "seconds": seconds,
        "losses": losses,
        **compare(seconds),
    }


def original_step(original: Any, train: Any) -> Callable[..., Callable[[], float]]:
    """(examples, waveforms) -> a step of the original recipe, with torch's plain Adam as there."""
    import torch
    from project_side import original_batch

    trained = [parameter for parameter in original.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=train.learning_rate, weight_decay=train.weight_decay)
    original.train()  # the frozen encoder with it: stochastic depth on, BatchNorm statistics of the batch

    def prepare(examples: Sequence[workload.Example], waveforms: Any) -> Callable[[], float]:
        batch = original_batch(examples, waveforms)

        def step() -> float:
            loss = original(batch.first, batch.second, batch.prompt_ids, batch.answer_ids)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
            optimizer.step()
            return loss.item()

        return step

    return prepare


def project_steps(models: dict[int, Any], train: Any) -> dict[str, Callable[..., Callable[[], float]]]:
    """Name -> (examples, waveforms) -> a step as the engine does it in one process on CPUs."""
    import torch
    from project_side import compact_layout, model_inputs, project_batch

    from mellow_ds.engine.optimizer import gradient_norm, parameter_groups, torch_optimizer

    # one optimizer for all: they share the decoder, and parameters without a gradient are passed over
    both = torch.nn.ModuleList(models.values())
    optimizer, _ = torch_optimizer(parameter_groups(both, train), train)
    trained = [parameter for parameter in both.parameters() if parameter.requires_grad]
    both.train()

    def prepare_for(model: Any) -> Callable[..., Callable[[], float]]:
        def prepare(examples: Sequence[workload.Example], waveforms: Any) -> Callable[[], float]:
            batch = project_batch(examples, waveforms, compact_layout(model))

            def step() -> float:
                loss_sum = model(**model_inputs(batch)).loss_sum
                (loss_sum / batch.num_answer_tokens).backward()
                norm = gradient_norm(p.grad for p in trained if p.grad is not None)
                torch.nn.utils.clip_grads_with_norm_(trained, train.max_grad_norm, torch.tensor(norm))
                optimizer.step()
                optimizer.zero_grad()
                return loss_sum.item() / batch.num_answer_tokens

            return step

        return prepare

    return {f"{audio_tokens} tokens a clip": prepare_for(model) for audio_tokens, model in models.items()}


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and how many times as fast each is as the original: the median of the rounds' ratios, and all rounds."""
    baseline = seconds[ORIGINAL]
    ratios = {
        name: [original / own for original, own in zip(baseline, values, strict=True)]
        for name, values in seconds.items()
        if name != ORIGINAL
    }
    return {
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_as_fast_rounds": ratios,
        "times_as_fast_median": {name: statistics.median(values) for name, values in ratios.items()},
        "times_as_fast_total": {name: sum(baseline) / sum(seconds[name]) for name in ratios},
    }


def compared(options: argparse.Namespace, result: dict[str, Any]) -> measuring.Comparison:
    """The table."""
    return measuring.Comparison(
        title=f"train step, {options.batch_size} examples, {options.threads} threads, {options.rounds} rounds",
        header=("variant", "median s", "times as fast (median)", "(total)"),
        seconds=result["median_seconds"],
        ratios=(result["times_as_fast_median"], result["times_as_fast_total"]),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the result."""
    given = sys.argv[1:] if arguments is None else arguments
    measuring.run_comparison("train_step", given, parse_arguments(given), measure, compared)


if __name__ == "__main__":
    main()
