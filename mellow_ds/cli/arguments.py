"""Command lines of the commands that take a run configuration: a few flags, then any key as `--section.key value`."""

import argparse
import textwrap

from mellow_ds.config.load import RENAMED, config_help, known_keys, load_run_config, recipe_names
from mellow_ds.config.schema import RunConfig
from mellow_ds.errors import ConfigError

_EXAMPLES = """
examples:
  python train.py --config quickstart --data.shards runs/quickstart/shards/train
  deepspeed --hostfile hosts train.py --config mellow --deepspeed_config ds_configs/zero2.json --train.batch_size 8
  torchrun --nproc-per-node 2 train.py --config digits --train.max_steps 500
  python train.py --mode evaluate_checkpoint --checkpoint_path RUN/checkpoints/step-000200 --config quickstart

exit codes: 0 done, 1 a fault, 2 a mistake in what was given, 85 stopped and saved (start again to go on),
130 stopped by Ctrl-C and saved
"""


class _RunParser(argparse.ArgumentParser):
    """With the keys of the run configuration in the help, which are put together for nothing else."""

    def format_help(self) -> str:
        keys = "keys of the run configuration, their defaults and what they mean:\n" + config_help()
        return f"{super().format_help()}\n{keys}\n"


def parse_run_arguments(arguments: list[str], program: str, mode: str = "") -> RunConfig:
    """The checked run configuration that a command line asks for; imports no torch."""
    parser = _RunParser(
        prog=program,
        usage=f"{program} --config CONFIG [--section.key VALUE ...]",
        description="Train an audio-language model on shards, or evaluate a checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXAMPLES,
        allow_abbrev=False,
    )
    recipes = ", ".join(recipe_names())
    parser.add_argument("--config", required=True, help=f"a YAML file, or a recipe: {recipes}")
    parser.add_argument("--checkpoint_path", help="step folder to evaluate or to start from (key resume_checkpoint)")
    parser.add_argument("--save-dir", dest="save_dir", help="run folder (key save_dir)")
    parser.add_argument("--distributed-backend", dest="distributed_backend", help="nccl or gloo")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    known, rest = parser.parse_known_args(arguments)
    overrides = read_overrides(rest)
    for key, value in (("resume_checkpoint", known.checkpoint_path), ("save_dir", known.save_dir),
                       ("distributed_backend", known.distributed_backend), ("mode", mode)):  # fmt: skip
        if value:
            overrides[key] = value
    return load_run_config(known.config, overrides)


def read_overrides(rest: list[str]) -> dict[str, str]:
    """`--a.b 1 --c=2` as {"a.b": "1", "c": "2"}; several values after a key make a list."""
    pairs: dict[str, str] = {}
    position = 0
    while position < len(rest):
        flag = rest[position]
        if not flag.startswith("--"):
            raise ConfigError(f"'{flag}' stands alone on the command line: keys are written --section.key VALUE")
        key, equals, value = flag[2:].partition("=")
        position += 1
        values = [value] if equals else []
        while not equals and position < len(rest) and not rest[position].startswith("--"):
            values.append(rest[position])
            position += 1
        if not values:
            hint = " true" if key in known_keys() or key in RENAMED else ""
            raise ConfigError(f"--{key} has no value: write --{key}{hint or ' VALUE'}")
        pairs[key] = values[0] if len(values) == 1 else "[" + ", ".join(values) + "]"
    return pairs


def wrapped(text: str) -> str:
    """A paragraph of help, wrapped for a terminal."""
    return textwrap.fill(textwrap.dedent(text).strip(), 100)
