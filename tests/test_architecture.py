"""The rules of the house, held by machines: style, types, the direction of imports, and what no file may contain.

The tools run here as `pre-commit` runs them, so a commit that they would refuse fails the suite too.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("mellow_ds", "shards")
PICKLERS = {"cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pickle.load", "pickle.loads"}
LINT_IMPORTS = [
    sys.executable,
    "-c",
    "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
]


def our_files() -> list[Path]:
    """Every file that git tracks or would track; in a copy without git, every file outside of made folders."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        names = [name for name in listed.stdout.decode().split("\0") if name]
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    made = set((ROOT / ".gitignore").read_text(encoding="utf-8").replace("/", "").split())
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if name not in made and not name.endswith(".egg-info")]
        found += [Path(folder) / name for name in names]
    return found


def our_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every file of ours that is text."""
    for path in our_files():
        content = path.read_bytes()
        if b"\0" not in content and path.suffix not in (".png", ".jpg", ".gif", ".flac", ".wav"):
            yield path.relative_to(ROOT).as_posix(), content.decode("utf-8")


def our_trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """(name, syntax tree) of every Python file of ours, or of those in `folders`."""
    for path in our_files():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py" and (not folders or name.split("/")[0] in folders):
            yield name, ast.parse(path.read_text(encoding="utf-8"), filename=name)


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name as written, call) of every call in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None where it is not given, "?" where it is no constant."""
    for item in call.keywords:
        if item.arg == name:
            return item.value.value if isinstance(item.value, ast.Constant) else "?"
    return None


def imported_modules(tree: ast.Module) -> set[str]:
    """Every module that `tree` imports, at the top or inside a function, by its full name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for name, call in calls(tree):
        if name.endswith("import_module") and call.args and isinstance(call.args[0], ast.Constant):
            found.add(str(call.args[0].value))
    return found


def run_tool(command: list[str], folder: Path = ROOT) -> None:
    """Run a checker; its findings are the failure's message."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_check_finds_nothing():
    run_tool([sys.executable, "-m", "ruff", "check", "."])


def test_ruff_format_would_change_nothing():
    run_tool([sys.executable, "-m", "ruff", "format", "--check", "."])


@pytest.mark.slow
def test_mypy_finds_nothing():
    run_tool([sys.executable, "-m", "mypy"])


def test_imports_keep_the_contracts():
    run_tool(LINT_IMPORTS)


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("mellow_ds/world.py", "import mellow_ds.config.load", "imports go one way"),
        ("mellow_ds/prompt.py", "def f():\n    from mellow_ds.shard_format import Manifest", "imports go one way"),
        ("mellow_ds/new_room.py", "", "imports go one way"),
        ("mellow_ds/model/new.py", "import mellow_ds.data.stream", "but the batch"),
        ("mellow_ds/trainer.py", "import deepspeed", "deepspeed is imported in one file"),
        ("mellow_ds/engine/new.py", "from deepspeed import comm", "deepspeed is imported in one file"),
        ("mellow_ds/cli/main.py", "import shards.cli", "nothing of what uses it"),
        ("mellow_ds/cli/main.py", "import benchmarks.train_step", "nothing of what uses it"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path, module, line, contract):
    for folder in LIBRARY:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    # `-c` puts the working directory first on the path: the copy is checked, whatever is installed
    done = subprocess.run(LINT_IMPORTS, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{contract}.* BROKEN", done.stdout), done.stdout


def test_the_batch_imports_nothing_of_ours():
    """Model and engine see it, so whatever it imported they would see too."""
    tree = ast.parse((ROOT / "mellow_ds" / "data" / "batch.py").read_text(encoding="utf-8"))
    assert not [name for name in imported_modules(tree) if name.startswith("mellow_ds")]


@pytest.mark.parametrize("name", ["deepspeed", "fully_shard"])
def test_a_back_end_is_imported_in_one_file(name):
    """Also where the name is given to `import_module`, which the import-linter does not see."""
    holders = [
        file
        for file, tree in our_trees(*LIBRARY, "launch", "train.py")
        if any(name in module.split(".") for module in imported_modules(tree))
    ]
    assert len(holders) <= 1, holders
    if name == "deepspeed":
        assert holders == ["mellow_ds/engine/deepspeed_engine.py"]


def test_every_python_file_says_what_it_is_for():
    empty_by_rule = [
        f"{path.parent.relative_to(ROOT).as_posix()}/__init__.py" for path in ROOT.glob("*/**/__init__.py")
    ]
    silent = [name for name, tree in our_trees() if ast.get_docstring(tree) is None and name not in empty_by_rule]
    assert not silent, f"no module docstring: {silent}"


def test_package_init_files_are_empty():
    """But for the public names of the top package."""
    full = [name for name, tree in our_trees(*LIBRARY) if name.endswith("/__init__.py") and tree.body]
    assert set(full) <= {"mellow_ds/__init__.py", "shards/__init__.py"}, full


def test_there_are_no_drawers():
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not [name for name, _ in our_trees() if Path(name).stem in drawers or drawers & set(Path(name).parts)]


def test_files_are_ascii():
    found = []
    for name, text in our_texts():
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.isascii():
                found.append(f"{name}:{number}: {line.strip()[:80]!a}")
    assert not found, "\n".join(found)


def test_no_file_names_a_machine_or_a_registry():
    """Paths of the machine that something was written on, and hosts that packages come from, are not for others."""
    paths = r"(?<![\w./-])/(?:work|root|home/\w+)(?:/|\b)"
    hosts = (
        r"pypi\.(?:org|python)|pythonhosted|registry\.npmjs|deb\.debian\.org|archive\.ubuntu\.com"
        r"|download\.pytorch\.org|anaconda\.org"
    )
    found = []
    for name, text in our_texts():
        if name == "tests/test_architecture.py":
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(f"{paths}|{hosts}", line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_no_shell_gets_a_string():
    found = []
    for name, tree in our_trees():
        for function, call in calls(tree):
            if keyword(call, "shell") not in (None, False) or function in (
                "os.system",
                "os.popen",
                "subprocess.getoutput",
            ):
                found.append(f"{name}:{call.lineno}: {function}")
    assert not found, "\n".join(found)


def test_nothing_but_tests_uses_a_pickler():
    """A test may write a hostile pickle, or see that what workers are handed survives one."""
    found = []
    for name, tree in our_trees():
        if name.startswith("tests/"):
            continue
        # torch.load(weights_only=True) raises pickle.UnpicklingError: that name may be used, and no other
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_pickle(node.value)}
        found += [f"{name}: pickle.{attribute}" for attribute in used - {"UnpicklingError"}]
        found += [f"{name}: {module}" for module in imported_modules(tree) & PICKLERS]
    assert not found, "\n".join(found)


def is_pickle(node: ast.expr) -> bool:
    """Whether the expression is the name of the pickle module."""
    return isinstance(node, ast.Name) and node.id == "pickle"


def test_nothing_from_outside_is_executed():
    """torch.load reads weights only, no YAML or numpy file builds objects, no code of a hub runs."""
    found = []
    for name, tree in our_trees():
        for function, call in calls(tree):
            is_bad = (
                (function == "torch.load" and keyword(call, "weights_only") is not True)
                or function in ("yaml.unsafe_load", "yaml.full_load")
                or keyword(call, "allow_pickle") not in (None, False)
                or keyword(call, "trust_remote_code") not in (None, False)
                or function in ("eval", "exec")
            )
            if is_bad:
                found.append(f"{name}:{call.lineno}: {ast.unparse(call)[:100]}")
    assert not found, "\n".join(found)


def test_only_world_reads_who_we_are():
    """RANK, SLURM_* and their like are read once, in mellow_ds/world.py, and passed on."""
    variables = re.compile(
        r"^(?:RANK|LOCAL_RANK|WORLD_SIZE|SLURM_PROCID|SLURM_LOCALID|SLURM_NTASKS|OMPI_COMM_WORLD_\w+)$"
    )
    found = []
    for name, tree in our_trees("mellow_ds"):
        if name == "mellow_ds/world.py":
            continue
        for node in ast.walk(tree):
            read = None
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.ctx, ast.Load)
                and ast.unparse(node.value) == "os.environ"
            ):
                read = node.slice
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv") and node.args:
                read = node.args[0]
            if isinstance(read, ast.Constant) and variables.match(str(read.value)):
                found.append(f"{name}:{node.lineno}: {read.value}")
    assert not found, "\n".join(found)
