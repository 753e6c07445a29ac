"""`mellow-ds doctor`: what will not work or will be slow in a training run, before anything of it is started."""

import argparse
import contextlib
import json
import sys
from typing import Any

from mellow_ds.cli.arguments import parse_run_arguments
from mellow_ds.config.schema import RunConfig
from mellow_ds.ds_config import read_engine_json
from mellow_ds.errors import EXIT_DONE, EXIT_USER, ConfigError, MellowError
from mellow_ds.option_parser import OptionParser

_DESCRIPTION = """Read run configuration, engine JSON, model sizes, shard manifests and machine together, and say what
will not work or will be slow, each with its reason and its cure. Nothing is started and nothing but manifests is
fetched. Takes all arguments of mellow-ds train besides its own."""
_EXAMPLES = """
examples:
  mellow-ds doctor --config mellow --deepspeed_config ds_configs/zero2.json --data.shards SHARDS
  mellow-ds doctor --config mellow --data.shards SHARDS --world 8 --gpu-memory 80
  mellow-ds doctor --config quickstart --data.shards SHARDS --world 2 --json
  mellow-ds doctor --hostfile hosts

exit codes: 0 nothing stops the run, 2 something will not work
"""


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    if _is_about_hosts(arguments):
        from mellow_ds.cli import preflight

        return preflight.main(arguments, program)
    options, config = _parse(arguments, program)
    engine_json = read_engine_json(config.deepspeed_config)
    from mellow_ds.doctor.offline import offline

    with offline():
        return _examine(config, engine_json, options)


def _examine(config: RunConfig, engine_json: dict[str, Any], options: argparse.Namespace) -> int:
    # torch and transformers are needed from here on
    from mellow_ds.doctor.examine import examine
    from mellow_ds.doctor.findings import by_severity, stops
    from mellow_ds.doctor.gather import gather, refused
    from mellow_ds.doctor.report import as_json, format_report

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs and warns on the standard output
        gathered = gather(config, engine_json, options.world, options.gpu_memory)
    findings = by_severity([*gathered.findings, *examine(gathered.case)])
    if not stops(findings) and (error := _refusal(config, gathered.case.machine.world)):
        findings = by_severity([refused(error), *findings])
    if options.json:
        print(json.dumps(as_json(gathered.case, findings), indent=1))
    else:
        print(format_report(gathered.case, findings))
    return EXIT_USER if stops(findings) else EXIT_DONE


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """The command's own options; raises where those of the run configuration would be refused."""
    if _is_about_hosts(arguments):
        from mellow_ds.cli import preflight

        return preflight.parse_arguments(arguments, program)
    options, config = _parse(arguments, program)
    read_engine_json(config.deepspeed_config)
    return options


def _is_about_hosts(arguments: list[str]) -> bool:
    return any(word.partition("=")[0] == "--hostfile" for word in arguments)


def _parse(arguments: list[str], program: str) -> tuple[argparse.Namespace, RunConfig]:
    parser = OptionParser(
        prog=program, description=_DESCRIPTION, epilog=_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", required=True, help="a YAML file, or a recipe, as for train")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="engine JSON (key deepspeed_config)")
    parser.add_argument("--world", type=int, default=0, metavar="N", help="ranks meant (default: the GPUs here, or 1)")
    parser.add_argument(
        "--gpu-memory", type=float, default=0.0, metavar="GB",
        help="memory of each GPU; where none is seen here, GPUs elsewhere are meant (default: what is there)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print findings and summary as JSON")
    parser.add_argument(
        "--hostfile", metavar="FILE",
        help="examine the hosts of a hostfile instead; `mellow-ds doctor --hostfile FILE --help` tells more",
    )  # fmt: skip
    options, rest = parser.parse_known_args(arguments)
    for name, value in (("--world", options.world), ("--gpu-memory", options.gpu_memory)):
        if value < 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    run = ["--config", options.config, *rest]
    if options.deepspeed_config is not None:
        run += ["--deepspeed_config", options.deepspeed_config]
    return options, parse_run_arguments(run, program)


def _refusal(config: RunConfig, world: int) -> MellowError | None:
    """What the run would refuse by itself before it takes a GPU."""
    from mellow_ds.cli.train import check_inputs
    from mellow_ds.world import World

    try:
        check_inputs(config, World(size=world))
    except MellowError as error:
        return error
    return None
