"""The commands that documents name: found in their text, and read by the parsers that would get them."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
PROGRAMS = ("mellow-ds", "mellow-shards", "python", "deepspeed", "torchrun", "srun", "sbatch", "mpirun", "bash")

# files of the reader, and what stands in for them here
READERS_CONFIGS = {"config/train_4gpu_example.yaml": "mellow-4gpu", "my.yaml": "mellow"}
# what is not run by the tests of this room, by how it begins, and why; all of it is parsed as far as it is ours. The
# pages on launching are walked on real hosts, line by line, in tests/cluster/test_pages.py.
NOT_RUN = {
    "srun": "typed on the hosts of tests/cluster",
    "sbatch": "the same",
    "deepspeed": "the same; on one host in tests/cli",
    "torchrun": "the same",
    "python train.py": "runs in tests/cli with a tiny model; as written it needs weights from a hub, or takes hours",
    "python benchmarks/": "runs in tests/benchmarks with minute networks; as written it takes minutes",
    "mellow-shards": "runs in tests/shards; as written it needs the reader's audio",
    "mellow-ds": "runs in tests/cli; as written it needs a run or a checkpoint of the reader",
    "bash launch/quickstart.sh": "takes 8 minutes; its record is in docs/results.md",
    "bash launch/test_distributed.sh": "typed on the hosts of tests/cluster",
    "python launch/check_env.py": "the same",
    "bash launch/ssh/": "the same; here --dry-run",
    "bash launch/deepspeed/": "the same",
    "bash launch/slurm/": "the same",
    "python launch/verify_slurm_setup.py": "the same",
    "bash launch/setup_env.sh": "the same; runs in tests/launch",
    "tail": "reads the log of a job; typed in tests/cluster",
    "scancel": "the same",
    "scontrol": "the same",
    "NODE_RANK=": "the same",
    "RANK=": "the same",
    "bash tests/run.sh": "is this suite",
    "bash tests/soak.sh": "takes 7 minutes; its record is in docs/results.md, a sample of each runs in tests/soak",
    "source .venv/bin/activate && pre-commit install": "writes into the clone's git hooks",
}


def fenced(document: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of the fenced blocks of a document, without their indentation."""
    for indent, language, text in re.findall(
        r"^( *)```(\w*)\n(.*?)^ *```$", document.read_text(), re.DOTALL | re.MULTILINE
    ):
        yield language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def fenced_commands(document: Path) -> list[str]:
    """Command lines of the fenced shell blocks, without comments; of blocks without a language, those of programs."""
    commands = []
    for language, text in fenced(document):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if language in ("bash", "sh", "") else []
            if words and (language or words[0] in (*PROGRAMS, "source")):
                commands.append(shlex.join(words) if "&&" not in words else " ".join(words))
    return commands


def mentioned_commands(document: Path) -> list[str]:
    """Command lines in `code` of running text and tables: whole ones, or the beginning of one."""
    prose = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in spans if span.split()[0] in PROGRAMS and " " in span]


def parse(command: str) -> None:
    """Read a command line as its program would; raises or exits where it would refuse it."""
    words = shlex.split(command)
    if re.fullmatch(r"[A-Z_]+=.*", words[0]):
        _run_dry(words)
        return
    program, rest = words[0], words[1:]
    if program not in _PARSERS:
        assert any(command.startswith(known) for known in NOT_RUN), f"no parser and no reason in NOT_RUN for: {command}"
        return
    _PARSERS[program](rest)


def check_mention(command: str) -> None:
    """What is named in running text exists: program, command, options."""
    words = [word for word in command.replace("[", " ").replace("]", " ").split() if word != "..."]
    if "train.py" in words:
        parse(command)
        return
    assert words[0] in _PARSERS, command
    if words[0] not in ("mellow-ds", "mellow-shards"):
        _PARSERS[words[0]](words[1:])
        return
    _check_options(words, help_of(words[0], words[1]))


def _check_options(words: list[str], shown: str) -> None:
    """Every option among `words` stands in a help text."""
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), f"{option} is no option in: {' '.join(words)}"


def shards_commands() -> list[str]:
    """Names of the commands of mellow-shards, as its help lists them."""
    return re.findall(r"^    (\w+)(?: |$)", help_of("mellow-shards", "--help"), re.MULTILINE)


def help_examples() -> list[str]:
    """The examples in the help of every command of both programs."""
    from mellow_ds.cli.main import COMMANDS

    shown = [help_of("mellow-ds", name) for name in COMMANDS if name != "evaluate"]  # its help is that of train
    shown += [help_of("mellow-shards", name) for name in shards_commands()]
    lines = [line for text in shown for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if re.match(rf"  ({'|'.join(PROGRAMS)}) ", line)]


def help_of(program: str, command: str) -> str:
    """What `PROGRAM COMMAND --help` prints."""
    module = {"mellow-ds": "mellow_ds.cli.main", "mellow-shards": "shards.cli"}[program]
    code = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{program} has no command {command}"
    return done.stdout


def _train(arguments: list[str], mode: str = "") -> None:
    from mellow_ds.cli.arguments import parse_run_arguments
    from mellow_ds.ds_config import read_engine_json

    if arguments == ["--help"]:
        return
    config = parse_run_arguments([READERS_CONFIGS.get(a, a) for a in arguments], "train.py", mode)
    read_engine_json(config.deepspeed_config)


def _script(script: str, arguments: list[str]) -> None:
    """A Python script of the clone."""
    assert (ROOT / script).is_file(), f"{script} is not there"
    if script == "train.py":
        _train(arguments)
        return
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        parse_arguments = getattr(_load(ROOT / script), "parse_arguments", None)
    finally:
        sys.path.pop(0)
    if parse_arguments is not None:
        parse_arguments(arguments)
    elif arguments:
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        _check_options(arguments, done.stdout)


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"documented_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _python(arguments: list[str]) -> None:
    modules = {
        "shards": _mellow_shards,
        "mellow_ds.cli.main": _mellow_ds,
        "mellow_ds.preflight.collectives": _collectives,
    }
    if arguments[0] == "-m":
        modules[arguments[1]](arguments[2:])
    else:
        _script(arguments[0], arguments[1:])


def _collectives(arguments: list[str]) -> None:
    from mellow_ds.preflight.collectives import parse_arguments

    parse_arguments(arguments)


def _mellow_ds(arguments: list[str]) -> None:
    from mellow_ds.cli.main import COMMANDS

    name, rest = arguments[0], arguments[1:]
    assert name in COMMANDS, f"mellow-ds has no command {name}"
    if name in ("train", "evaluate"):
        _train(rest, "evaluate_checkpoint" if name == "evaluate" else "")
        return
    module = importlib.import_module(COMMANDS[name][0])
    module.parse_arguments(rest, f"mellow-ds {name}")


def _mellow_shards(arguments: list[str]) -> None:
    from mellow_ds.cli.arguments import read_overrides
    from mellow_ds.config.load import load_run_config
    from shards.cli import _parser

    options, rest = _parser().parse_known_args(arguments)
    assert options.takes_overrides or not rest, f"unrecognized: {rest}"
    if rest:
        load_run_config(options.config, read_overrides(rest))


def _deepspeed(arguments: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(arguments)
    _script(options.user_script, options.user_args)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(arguments)
    _script(options.training_script, options.training_script_args)


def _srun(arguments: list[str]) -> None:
    while arguments[0].startswith("-"):  # its own options are written as one word: --nodes=2
        arguments = arguments[1:]
    parse(shlex.join(arguments))


def _sbatch(arguments: list[str]) -> None:
    """A batch script of the clone, as far as it goes without SLURM; sbatch's own options are written as one word."""
    array = {}
    while arguments[0].startswith("-"):
        if arguments[0].startswith("--array="):
            tasks = [int(number) for number in re.findall(r"\d+", arguments[0])]
            count = tasks[1] + 1 if "-" in arguments[0].removeprefix("--") else len(tasks)
            numbers = {"TASK_ID": tasks[0], "TASK_MIN": tasks[0], "TASK_MAX": tasks[1], "TASK_COUNT": count}
            array = {f"SLURM_ARRAY_{name}": str(number) for name, number in numbers.items()}
        arguments = arguments[1:]
    script = ROOT / arguments[0]
    assert script.is_file(), f"{arguments[0]} is not there"
    environ = {**{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}, **array}
    command = ["bash", *arguments, "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    # what it would run takes its arguments, too
    for line in done.stdout.splitlines():
        if " train.py " in line:
            _train(shlex.split(line.partition(" train.py ")[2]))
        elif line.startswith("python -m shards "):
            parse(line)


def _bash(arguments: list[str]) -> None:
    script = ROOT / arguments[0]
    assert script.is_file(), f"{arguments[0]} is not there"
    if script.parent.name == "slurm":
        _sbatch([word for word in arguments if word != "--dry-run"])
        return
    if script.parent.name in ("ssh", "deepspeed"):
        _run_dry(["bash", *arguments])
        return
    subprocess.run(["bash", "-n", script], check=True)


def _run_dry(words: list[str]) -> None:
    """A script of launch/, with variables before it or without, as far as it goes without a host."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts"
        hosts.write_text("node1 slots=4\nnode2 slots=4\n")
        readers = {**READERS_CONFIGS, "hosts": str(hosts), "CONFIG": "mellow"}
        variables = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
        command = [readers.get(word, word) for word in words[len(variables) :]]
        done = subprocess.run(
            ["env", f"MELLOW_VENV={sys.prefix}", *variables, *command, "--dry-run"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    assert "--config" in done.stdout


_PARSERS: dict[str, Callable[[list[str]], None]] = {
    "mellow-ds": _mellow_ds,
    "mellow-shards": _mellow_shards,
    "python": _python,
    "deepspeed": _deepspeed,
    "torchrun": _torchrun,
    "srun": _srun,
    "sbatch": _sbatch,
    "bash": _bash,
}
