"""What the scripts of launch/ ask the library for: hosts, ranks, variables and quoted words, as assignments for bash.

    python -m mellow_ds.cli.script_plan [--for-deepspeed] [options of mellow-ds launch] -- train.py --config ...

The plan is that of `mellow-ds launch` with the same options, mistakes in it included; nothing is started.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Mapping

from mellow_ds.cli.arguments import parse_run_arguments
from mellow_ds.cli.launch import make_plan, parse_arguments
from mellow_ds.ds_config import read_engine_json
from mellow_ds.errors import EXIT_DONE, ConfigError, MellowError
from mellow_ds.launcher.environment import Travelling
from mellow_ds.launcher.plan import LaunchPlan

_PROGRAM = "script_plan"


def main(arguments: list[str]) -> int:
    """Print the assignments; a mistake is one line, and code 2."""
    try:
        is_for_deepspeed = arguments[:1] == ["--for-deepspeed"]
        options = parse_arguments(arguments[is_for_deepspeed:], _PROGRAM)
        plan = make_plan(options)
        config = parse_run_arguments(options.command[1:], options.command[0])
        read_engine_json(config.deepspeed_config)  # what is wrong with it shows here, before a host is spoken to
        lines = assignments(plan, config.save_dir)
        if is_for_deepspeed:
            lines += deepspeed_assignments(plan, options.command[1:])
        print("\n".join(lines))
    except MellowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def assignments(plan: LaunchPlan, save_dir: str) -> list[str]:
    """Lines of bash that set what a script needs.

    PLAN_HOSTS, PLAN_RANKS (ranks of each host) and PLAN_DEVICES (its GPUs, `0,1`; empty: all) go by the place of the
    host. PLAN_SHOWN and PLAN_WITHHELD are for the dry run.
    """
    travelling = plan.travelling
    return [
        _array("PLAN_HOSTS", [host.name for host in plan.hosts]),
        _array("PLAN_RANKS", [str(host.num_ranks) for host in plan.hosts]),
        _array("PLAN_DEVICES", [",".join(map(str, host.devices)) for host in plan.hosts]),
        f"PLAN_MASTER={shlex.quote(plan.master_address)}",
        f"PLAN_SAVE_DIR={shlex.quote(save_dir)}",
        _array("PLAN_ASSIGNMENTS", [f"{name}={value}" for name, value in travelling.named.items()]),
        f"PLAN_EXPORTS={shlex.quote(export_commands(travelling))}",
        _array("PLAN_SHOWN", travelling.shown()),
        _array("PLAN_WITHHELD", travelling.withheld),
    ]


def deepspeed_assignments(plan: LaunchPlan, words: Iterable[str]) -> list[str]:
    """The same for the scripts that hand a hostfile to DeepSpeed; `words`: the arguments of train.py.

    PLAN_HOSTFILE has a slot for every number that PLAN_INCLUDE names.
    """
    slots = {host.name: host.devices or tuple(range(host.num_ranks)) for host in plan.hosts}
    include = "@".join(f"{name}:{','.join(map(str, numbers))}" for name, numbers in slots.items())
    return [
        f"PLAN_INCLUDE={shlex.quote(include)}",
        f"PLAN_HOSTFILE={_text(f'{name} slots={max(numbers) + 1}' for name, numbers in slots.items())}",
        f"PLAN_DEEPSPEED_ENV={_text(deepspeed_env_lines(plan.travelling))}",
        _array("PLAN_DEEPSPEED_WORDS", [for_deepspeed_pdsh(word) for word in words]),
    ]


def export_commands(travelling: Travelling) -> str:
    """Commands of a POSIX shell that set the variables; what is set on the host stands above what is only allowed."""
    lines = [
        f'[ -n "${{{name}+x}}" ] || export {name}={shlex.quote(value)}; ' for name, value in travelling.allowed.items()
    ]
    lines += [f"export {name}={shlex.quote(value)}; " for name, value in travelling.named.items()]
    return "".join(lines)


def deepspeed_env_lines(travelling: Travelling) -> list[str]:
    """Lines of a `.deepspeed_env` that reach the hosts as they are meant.

    DeepSpeed puts a value with unusual characters between double quotes as it is, and the shell of the host reads what
    comes of it (deepspeed/launcher/multinode_runner.py, add_export): so a value is written as the shell wants it there.
    """
    _refuse_line_breaks({**travelling.allowed, **travelling.named})
    # DeepSpeed's quotes and the first and last pair here come to nothing; they keep blanks at the ends
    lines = [f'{name}=""{_for_pdsh(_within_quotes(value))}""' for name, value in travelling.named.items()]
    for name, value in travelling.allowed.items():
        inside = _for_pdsh(_within_quotes(value))
        # within ${...} bash takes these two for its own; such a value stands above the host's
        is_plain = "'" not in value and "}" not in value
        lines.append(f"{name}=${{{name}-{inside}}}" if is_plain else f'{name}=""{inside}""')
    return lines


def for_deepspeed_pdsh(word: str) -> str:
    r"""An argument so that it reaches train.py as it is through DeepSpeed's pdsh runner and the shell of the host.

    The runner puts a word with a blank between double quotes, with its `"` as `\"`, and any other word there as it is.
    """
    if " " in word:
        return _for_pdsh(re.sub(r"([\\$`])", r"\\\1", word))
    return _for_pdsh(shlex.quote(word))


def _for_pdsh(text: str) -> str:
    """pdsh takes %n, %h and %u for its own, and %% for a %."""
    return text.replace("%", "%%")


def _within_quotes(value: str) -> str:
    """A value for a place between double quotes."""
    return re.sub(r'([\\"$`])', r"\\\1", value)


def _refuse_line_breaks(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if "\n" in value or "\r" in value:
            raise ConfigError(
                f"the value of {name} has a line break, which DeepSpeed's launcher cannot send: unset it, or start "
                "with launch/ssh/multi_node.sh"
            )


def _array(name: str, words: Iterable[str]) -> str:
    return f"{name}=({' '.join(shlex.quote(word) for word in words)})"


def _text(lines: Iterable[str]) -> str:
    return shlex.quote("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
