"""`mellow-ds launch`: one run on the hosts of a hostfile, or on this one; watched, and nothing left behind."""

import argparse
import os
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mellow_ds.errors import EXIT_DONE, ConfigError
from mellow_ds.launcher.describe import count, describe
from mellow_ds.launcher.environment import choose_variables
from mellow_ds.launcher.hostfile import Host, check_host_name, filter_hosts, limit_slots, read_hostfile
from mellow_ds.launcher.plan import (
    ANY_PORT,
    DEFAULT_PORT,
    LOCAL_NAMES,
    LaunchPlan,
    choose_master,
    place_ranks,
    rank_command,
)
from mellow_ds.launcher.remote import host_command, local_hosts
from mellow_ds.option_parser import OptionParser

_STOP_SECONDS = 300.0
_MAX_RESTARTS = 3
_DESCRIPTION = """Start one run on the hosts of a hostfile (or on this host), one process a slot; show what every rank
says with its name before it, and keep it in a file of its own; end all where one fails. Hosts are reached by ssh
without a password and must see the same folders. What stands after -- is the same for every rank: a Python script, or a
program."""
_EXAMPLES = """
examples:
  mellow-ds launch --num-per-host 2 -- train.py --config quickstart --data.shards SHARDS
  mellow-ds launch --hostfile hosts -- train.py --config mellow --data.shards SHARDS --save-dir runs/mine
  mellow-ds launch --hostfile hosts --include node1:0,1@node2 --dry-run -- train.py --config mellow --data.shards SHARDS
  mellow-ds launch --hostfile hosts --env-file launch/env.sh -- train.py --config mellow --data.shards SHARDS

exit codes: 0 done, 2 a host or an option that cannot be used (nothing was started), 85 and 130 stopped with the state
saved, else that of the rank that failed first (128 and the signal where one ended it), 1 where a host was lost
"""


def main(arguments: list[str], program: str) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments, program)
    plan = make_plan(options)
    log_folder = _log_folder(options)
    local = local_hosts(host.name for host in plan.hosts)
    commands = {host.name: host_command(plan, host.name, host.name in local, options.ssh_config) for host in plan.hosts}
    check_hosts(plan, local)
    _check_restart(options, plan)
    if options.dry_run:
        print("\n".join(describe(plan, commands, log_folder)))
        return EXIT_DONE
    from mellow_ds.launcher.attempts import Attempts
    from mellow_ds.launcher.output import Output

    output = Output(log_folder)
    try:
        return Attempts(plan, commands, output, options.stop_seconds).run()
    finally:
        output.close()


def parse_arguments(arguments: list[str], program: str) -> argparse.Namespace:
    """Options, and as `command` what stands after `--`."""
    parser = OptionParser(
        prog=program, usage=f"{program} [options] -- train.py --config ...", description=_DESCRIPTION,
        epilog=_EXAMPLES, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_hosts(parser)
    _add_restart(parser)
    _add_environment(parser)
    parser.add_argument("--log-dir", metavar="FOLDER", help="for rank-N.log (default: logs in the run folder)")
    parser.add_argument(
        "--stop-seconds", type=float, default=_STOP_SECONDS, metavar="N",
        help="that ranks get to save after Ctrl-C or SIGTERM (default: %(default).0f)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print hosts, ranks, commands and variables, start nothing"
    )
    own, command = _split(arguments)
    options = parser.parse_args(own)
    if not command:
        raise ConfigError("no command is given: end with `-- train.py --config ...`")
    options.command = command
    if options.stop_seconds < 0:
        raise ConfigError(f"--stop-seconds is {options.stop_seconds}; it must be 0 or more")
    return options


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hosts")
    group.add_argument("--hostfile", metavar="FILE", help="a line a host: `name slots=N` (default: this host alone)")
    group.add_argument(
        "--num-per-host", type=int, metavar="N", help="processes a host (default: its slots; here: its GPUs, or 1)"
    )
    group.add_argument("--include", default="", metavar="HOSTS", help="only these: `name@name:slot,slot`")
    group.add_argument("--exclude", default="", metavar="HOSTS", help="all but these: `name@name:slot,slot`")
    group.add_argument("--master-addr", default="", metavar="ADDRESS", help="of the first host, as all others see it")
    group.add_argument(
        "--master-port",
        type=int,
        metavar="PORT",
        help=f"where the ranks meet (default: with a hostfile {DEFAULT_PORT}, or a free one)",
    )
    group.add_argument("--ssh-config", default="", metavar="FILE", help="for ssh -F (default: the user's own)")


def _add_restart(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("elastic restart")
    group.add_argument(
        "--min-hosts", type=int, default=0, metavar="N",
        help="go on from the newest checkpoint where a host is lost and N are left (default: end the run)",
    )  # fmt: skip
    group.add_argument(
        "--max-restarts", type=int, default=_MAX_RESTARTS, metavar="N", help="of that kind (default: %(default)s)"
    )


def _add_environment(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("environment of the ranks")
    group.add_argument(
        "--env",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="send this variable too: NAME, or NAME=value",
    )
    group.add_argument(
        "--env-file", default="", metavar="FILE", help="shell file that each host sources first, as launch/env.sh"
    )
    group.add_argument(
        "--python",
        default="",
        metavar="FILE",
        help="interpreter on the hosts (default: this one; `python` of --env-file)",
    )
    group.add_argument(
        "--interface", default="", metavar="NAME", help="network interface of collectives, on every host"
    )


def make_plan(options: argparse.Namespace) -> LaunchPlan:
    """All that can be decided without speaking to a host; raises `ConfigError`."""
    hosts = _choose_hosts(options)
    env_file = str(Path(options.env_file).resolve()) if options.env_file else ""
    if env_file and not Path(env_file).is_file():
        raise ConfigError(f"--env-file {options.env_file} is not there")
    for option, file in (("--ssh-config", options.ssh_config), ("the script", _script(options.command))):
        if file and not Path(file).is_file():
            raise ConfigError(f"{option} {file} is not there")
    # runs of one host meet wherever a port is free: two that start together would both find the usual one free
    port = options.master_port or (DEFAULT_PORT if options.hostfile else ANY_PORT)
    if options.master_port is not None and not 0 < options.master_port < 65_536:
        raise ConfigError(f"--master-port is {options.master_port}; a port is a number from 1 to 65535")
    if options.master_addr:
        check_host_name(options.master_addr, "--master-addr")
    if options.interface and not re.fullmatch(r"[A-Za-z0-9_.:,^=-]+", options.interface):
        raise ConfigError(f"--interface {options.interface} is not the name of a network interface")
    interpreter = options.python or ("python" if env_file else sys.executable)
    return LaunchPlan(
        hosts=place_ranks(hosts),
        command=rank_command(options.command, interpreter),
        folder=str(Path.cwd()),
        travelling=choose_variables(os.environ, options.env),
        master_address=choose_master(hosts, options.master_addr),
        master_port=port,
        is_port_fixed=options.master_port is not None,
        interface=options.interface,
        env_file=env_file,
        interpreter=interpreter,
        launch_id=secrets.token_hex(8),
        min_hosts=options.min_hosts,
        max_restarts=options.max_restarts if options.min_hosts else 0,
    )


def _choose_hosts(options: argparse.Namespace) -> list[Host]:
    if not options.hostfile:
        if options.include or options.exclude:
            raise ConfigError("--include and --exclude choose from a hostfile: give --hostfile")
        number = _num_gpus() if options.num_per_host is None else options.num_per_host
        if number < 1:
            raise ConfigError(f"--num-per-host is {number}; it must be above 0")
        return [Host("localhost", tuple(range(number)))]
    hosts = filter_hosts(read_hostfile(Path(options.hostfile)), options.include, options.exclude)
    return hosts if options.num_per_host is None else limit_slots(hosts, options.num_per_host)


def _num_gpus() -> int:
    """GPUs of this host that its processes see, without torch; 1 where there are none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return max(len([word for word in chosen.split(",") if word.strip()]), 1)
    return max(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))), 1)


def check_hosts(plan: LaunchPlan, local: frozenset[str]) -> None:
    if len(local) > 1:
        raise ConfigError(f"the hosts {' and '.join(sorted(local))} are one and the same, this one: give it one line")
    if len(local) < len(plan.hosts) and shutil.which("ssh") is None:
        raise ConfigError("ssh is not installed here, and the hosts are reached by it: install openssh-client")
    if "localhost" in local and len(plan.hosts) > 1 and plan.master_address in ("localhost", "127.0.0.1"):
        raise ConfigError("other hosts cannot reach localhost of this one: give --master-addr with its name")


def _check_restart(options: argparse.Namespace, plan: LaunchPlan) -> None:
    """Refuse a start that could not go on with fewer hosts as it began."""
    if not options.min_hosts:
        return
    num_hosts, num_ranks = len(plan.hosts), plan.num_ranks
    if not 0 < options.min_hosts <= num_hosts:
        raise ConfigError(f"--min-hosts is {options.min_hosts}, but the run has {count(num_hosts, 'host')}")
    if options.max_restarts < 1:
        raise ConfigError(f"--max-restarts is {options.max_restarts}; it must be above 0, or leave out --min-hosts")
    unnamed = [host.name for host in plan.hosts if host.name in LOCAL_NAMES]
    if unnamed:
        raise ConfigError(f"--min-hosts: any host may become the first, and {unnamed[0]} is none to others: name it")
    if not _is_training(options.command):
        return
    from mellow_ds.cli.arguments import parse_run_arguments

    config = parse_run_arguments(options.command[1:], options.command[0])
    train, accumulation = config.train, config.train.gradient_accumulation_steps
    if config.mode == "train" and not train.global_batch_size:
        instead = " instead of train.gradient_accumulation_steps" if accumulation > 1 else ""
        raise ConfigError(
            "--min-hosts: with fewer ranks the batch of a step would shrink: give --train.global_batch_size "
            f"{train.batch_size * num_ranks * accumulation}{instead} (batch size {train.batch_size} x "
            f"{count(num_ranks, 'rank')} x accumulation {accumulation})"
        )
    if config.mode == "train" and train.resume == "never":
        raise ConfigError("--min-hosts: a restart goes on from the newest checkpoint, but train.resume is never")


def _log_folder(options: argparse.Namespace) -> Path | None:
    """Where the ranks' logs go: as asked, or `logs` in the run folder where that is known; None: nowhere."""
    if options.log_dir:
        return Path(options.log_dir)
    if _is_training(options.command):
        from mellow_ds.cli.arguments import parse_run_arguments

        # a mistake in them is found here, before a host is spoken to
        return Path(parse_run_arguments(options.command[1:], options.command[0]).save_dir) / "logs"
    for place, word in enumerate(options.command):
        if word == "--save-dir" and place + 1 < len(options.command):
            return Path(options.command[place + 1]) / "logs"
        if word.startswith("--save-dir="):
            return Path(word.partition("=")[2]) / "logs"
    return None


def _is_training(command: Sequence[str]) -> bool:
    """Whether the command is this project's train.py; a script around it may take other arguments."""
    script = Path(_script(command) or ".")
    if script.name != "train.py" or not script.is_file():
        return False
    return "mellow_ds.cli.train" in script.read_text(encoding="utf-8", errors="replace")


def _script(command: Sequence[str]) -> str:
    return command[0] if command[0].endswith(".py") else ""


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return list(arguments), []
    place = arguments.index("--")
    return list(arguments[:place]), list(arguments[place + 1 :])
