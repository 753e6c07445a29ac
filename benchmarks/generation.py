"""Seconds to generate answers for a batch: the original recipe without a cache, and the project with 33 and with 129
tokens a clip, side by side.

Encoding of the clips is in it on both sides, and everyone makes the same number of tokens. Making one answer the
original way takes minutes, so its tokens are dealt out over the rounds: in each it makes a part of them, then the
project makes whole answers. The original's seconds are the sum of its parts.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import measuring
import workload

ORIGINAL = "original recipe"
EXAMPLES = """examples:
  python benchmarks/generation.py --out benchmarks/results/generation.json
  python benchmarks/generation.py --tiny --tokens 4 --rounds 2        does it run? (seconds)
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = measuring.comparison_parser(__doc__, EXAMPLES, rounds=4, batch_size=8)
    parser.add_argument("--tokens", type=measuring.positive, default=32, help="tokens an answer (default 32)")
    options = parser.parse_args(arguments)
    if options.tokens < options.rounds:
        parser.error(f"--tokens {options.tokens} cannot be dealt out over --rounds {options.rounds}")
    return options


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
    examples = workload.draw_examples(options.batch_size, options.seed, sizes.vocab_size)
    clip_samples = recipe_config(sizes).data.clip_samples
    waveforms = draw_waveforms(options.batch_size, clip_samples, options.seed)

    next(original_tokens(original, examples, waveforms))  # warm-up; the project's is a whole run
    runs = {ORIGINAL: in_parts(original_tokens(original, examples, waveforms), options.tokens, options.rounds)}
    for audio_tokens, model in models.items():
        generate = project_run(model, examples, waveforms, options.tokens)
        generate()
        runs[f"{audio_tokens} tokens a clip"] = lambda _, run=generate: measuring.timed(run)
    seconds = measuring.take_turns(runs, options.rounds)
    return {
        "batch_size": options.batch_size,
        "new_tokens": options.tokens,
        "original_tokens_of_rounds": part_sizes(options.tokens, options.rounds),
        "sizes": vars(sizes),
        "num_parameters": count_parameters(models),
        "workload": workload.describe(examples),
        "seconds": seconds,
        **compare(seconds),
    }


def original_tokens(original: Any, examples: Sequence[workload.Example], waveforms: Any) -> Iterator[Any]:
    """The original's answers, one token [B] at a time; the clips are encoded with the first."""
    from project_side import original_batch

    original.eval()
    batch = original_batch(examples, waveforms)
    return original.generate(batch.first, batch.second, batch.prompt_ids)


def project_run(
    model: Any, examples: Sequence[workload.Example], waveforms: Any, new_tokens: int
) -> Callable[[], None]:
    """The project's answers, as evaluation makes them, but of exactly `new_tokens` tokens."""
    from project_side import compact_layout, model_inputs, project_batch

    model.eval()
    inputs = model_inputs(project_batch(examples, waveforms, compact_layout(model), for_generation=True))
    del inputs["labels"]

    def run() -> None:
        found = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        if found.shape != (len(examples), new_tokens):
            raise RuntimeError(f"{new_tokens} tokens for {len(examples)} rows wanted, {list(found.shape)} made")

    return run


def part_sizes(tokens: int, parts: int) -> list[int]:
    """`tokens` in `parts` parts that differ by one at most."""
    return [tokens * (part + 1) // parts - tokens * part // parts for part in range(parts)]


def in_parts(stream: Iterator[Any], tokens: int, parts: int) -> Callable[[int], float]:
    """Number of a part -> seconds that its tokens take."""
    sizes = part_sizes(tokens, parts)
    return lambda part: measuring.timed(lambda: list(itertools.islice(stream, sizes[part])))


def compare(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The original's sum against the project's medians, and against its slowest rounds."""
    original = sum(seconds[ORIGINAL])
    project = {name: values for name, values in seconds.items() if name != ORIGINAL}
    medians = {name: statistics.median(values) for name, values in project.items()}
    return {
        "answer_seconds": {ORIGINAL: original, **medians},
        "times_as_fast": {name: original / median for name, median in medians.items()},
        "times_as_fast_slowest_round": {name: original / max(values) for name, values in project.items()},
    }


def compared(options: argparse.Namespace, result: dict[str, Any]) -> measuring.Comparison:
    """The table."""
    return measuring.Comparison(
        title=f"generation of {options.tokens} tokens, {options.batch_size} examples, {options.threads} threads",
        header=("variant", "seconds", "times as fast (median)", "(slowest round)"),
        seconds=result["answer_seconds"],
        ratios=(result["times_as_fast"], result["times_as_fast_slowest_round"]),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the result."""
    given = sys.argv[1:] if arguments is None else arguments
    measuring.run_comparison("generation", given, parse_arguments(given), measure, compared)


if __name__ == "__main__":
    main()
