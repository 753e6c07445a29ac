"""`mellow-ds doctor --hostfile`: whether the hosts of a run can run it together, before anything of it is started."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from mellow_ds.config.schema import RunConfig
from mellow_ds.errors import EXIT_DONE, EXIT_USER, ConfigError
from mellow_ds.launcher.plan import LaunchPlan
from mellow_ds.option_parser import OptionParser

# of `mellow-ds launch`, taken here with the same meaning
_LAUNCH_OPTIONS = (
    "hostfile", "include", "exclude", "master-addr", "master-port", "ssh-config", "env-file", "python", "interface",
)  # fmt: skip

_DESCRIPTION = """Ask every host of a hostfile, at once and in seconds, what a run needs of it: ssh, Python and
packages, this project's commit, GPUs and driver, memory and disk, the shared folders, clocks, the port where ranks
meet, the interface between the hosts, compiled ops, limits. A line a host, what differs marked with a *, then what is
wrong with its cure. Nothing is started but the questions. Hosts are reached as by mellow-ds launch, with the same
options."""
_EXAMPLES = """
examples:
  mellow-ds doctor --hostfile hosts
  mellow-ds doctor --hostfile hosts --interface eth0 --shared /data/runs --json
  mellow-ds doctor --hostfile hosts --config mellow --data.shards SHARDS --save-dir runs/mine

exit codes: 0 nothing stops a run, 2 something will
"""


@dataclass(frozen=True)
class _Asked:
    """What the command line says."""

    options: argparse.Namespace
    folders: tuple[str, ...]  # that all hosts are to share, absolute
    shards: tuple[str, ...]  # that all read, absolute


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    asked = _parse(arguments, program)
    from mellow_ds.cli.launch import check_hosts
    from mellow_ds.doctor.findings import stops
    from mellow_ds.launcher.remote import host_command, local_hosts
    from mellow_ds.preflight.report import as_json, format_report
    from mellow_ds.preflight.rules import examine
    from mellow_ds.preflight.survey import PROBE, Surveyor

    plan = _plan(asked.options)
    local = local_hosts(host.name for host in plan.hosts)
    check_hosts(plan, local)
    commands = {
        host.name: host_command(plan, host.name, host.name in local, asked.options.ssh_config, PROBE)
        for host in plan.hosts
    }
    survey = Surveyor(plan, commands, asked.folders, asked.shards).run()
    findings = examine(survey, plan)
    if asked.options.json:
        print(json.dumps(as_json(survey, findings), indent=1))
    else:
        print(format_report(survey, plan, findings))
    return EXIT_USER if stops(findings) else EXIT_DONE


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """The command's own options; raises where those of the run configuration would be refused."""
    return _parse(arguments, program).options


def _parse(arguments: list[str], program: str) -> _Asked:
    parser = OptionParser(
        prog=program, description=_DESCRIPTION, epilog=_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--hostfile", required=True, metavar="FILE", help="a line a host: `name slots=N`")
    parser.add_argument("--include", default="", metavar="HOSTS", help="only these: `name@name:slot,slot`")
    parser.add_argument("--exclude", default="", metavar="HOSTS", help="all but these: `name@name:slot,slot`")
    parser.add_argument("--master-addr", default="", metavar="ADDRESS", help="of the first host, as all others see it")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="where the ranks meet (default: 29500)")
    parser.add_argument("--ssh-config", default="", metavar="FILE", help="for ssh -F (default: the user's own)")
    parser.add_argument("--env-file", default="", metavar="FILE", help="shell file that each host sources first")
    parser.add_argument("--python", default="", metavar="FILE", help="interpreter on the hosts (default: this one)")
    parser.add_argument("--interface", default="", metavar="NAME", help="network interface meant for collectives")
    parser.add_argument(
        "--shared", nargs="+", action="extend", default=[], metavar="FOLDER",
        help="folders that all hosts are to see (default: this one, and save_dir and data.shards of --config)",
    )  # fmt: skip
    parser.add_argument("--config", metavar="NAME", help="a run configuration, followed by its keys, as for train")
    parser.add_argument("--json", action="store_true", help="print all that the hosts told, and the findings, as JSON")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.config is None:
        raise ConfigError(f"'{rest[0]}' is not an option of {program} --hostfile; keys of a run follow --config NAME")
    config = None
    if options.config is not None:
        from mellow_ds.cli.arguments import parse_run_arguments

        config = parse_run_arguments(["--config", options.config, *rest], program)
    return _Asked(options, _folders(options.shared, config), _shards(config))


def _folders(named: Sequence[str], config: RunConfig | None) -> tuple[str, ...]:
    """What all hosts are to share, absolute, each once."""
    folders = [*(named or ["."]), *([config.save_dir] if config is not None else [])]
    return tuple(dict.fromkeys(map(_as_absolute, folders)))


def _shards(config: RunConfig | None) -> tuple[str, ...]:
    """Local folders of shards; remote ones (s3://, https://) are nobody's folder."""
    if config is None:
        return ()
    return tuple(_as_absolute(folder) for folder in config.data.train_shards if "://" not in folder)


def _as_absolute(folder: str) -> str:
    """A path as every host is to know it; links are left, since they may lead elsewhere there."""
    return os.path.abspath(folder)  # noqa: PTH100 (resolve() would follow links)


def _plan(options: argparse.Namespace) -> LaunchPlan:
    """As `mellow-ds launch` would make it of the same options, with nothing to run."""
    from mellow_ds.cli.launch import make_plan
    from mellow_ds.cli.launch import parse_arguments as parse_launch_arguments

    words = []
    for name in _LAUNCH_OPTIONS:
        value = getattr(options, name.replace("-", "_"))
        if value not in ("", None):
            words += [f"--{name}={value}"]
    return make_plan(parse_launch_arguments([*words, "--", "true"], "mellow-ds launch"))
