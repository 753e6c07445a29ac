"""What is installed, what it requires, what is pinned, and that the commands answer without torch."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mellow_ds.config.load import load_run_config, recipe_names

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")  # those that torch 2.11 has wheels for
EXTRAS = ("lora", "plot", "gguf", "test")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built by setuptools from a copy of what belongs to it, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    # with what must not be packed beside what must
    for name in ("mellow_ds", "shards", "tests", "launch", "ds_configs", "benchmarks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "train.py"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, "out"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel):
    """The METADATA of the wheel, as a message with headers."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode("utf-8"))


def requirements_of(metadata) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def holds(requirement: Requirement, python: str, extra: str = "") -> bool:
    """Whether a requirement counts on Linux with that Python."""
    if requirement.marker is None:
        return True
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "extra": extra,
    }
    return requirement.marker.evaluate(environment)


def pins() -> list[Requirement]:
    """The lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def pins_for(python: str) -> dict[str, str]:
    """name -> version pinned for that Python."""
    found: dict[str, str] = {}
    for pin in pins():
        if holds(pin, python):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "==", pin
            found[name] = specifier.version
    return found


def test_the_wheel_holds_the_library_and_shards_only(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    version = re.search(r'__version__ = "(.+)"', (ROOT / "mellow_ds" / "__init__.py").read_text()).group(1)
    assert tops == {"mellow_ds", "shards", f"mellow_ds-{version}.dist-info"}


def test_the_wheel_holds_every_module_and_recipe(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for top in ("mellow_ds", "shards")
        for path in (ROOT / top).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected  # a room without __init__.py would be missing


def test_the_wheel_brings_the_two_commands_and_the_license(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    lines = wheel.read(entry_points).decode().split("\n")
    assert [line for line in lines if "=" in line] == [
        "mellow-ds = mellow_ds.cli.main:main",
        "mellow-shards = shards.cli:main",
    ]
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_metadata(metadata):
    assert metadata["Name"] == "mellow-ds"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    plain = {canonicalize_name(r.name): r for r in requirements_of(metadata) if holds(r, "3.11")}
    assert str(plain["torch"].specifier) == str(plain["torchaudio"].specifier), "their wheels must be of one release"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_in_its_range(metadata, python):
    pinned = pins_for(python)
    for requirement in requirements_of(metadata):
        if any(holds(requirement, python, extra) for extra in ("", *EXTRAS)):
            name = canonicalize_name(requirement.name)
            assert name in pinned, f"{name} has no pin for Python {python}"
            assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is not {requirement.specifier}"
    assert pinned["torch"] == pinned["torchaudio"]


def test_the_pins_name_no_place():
    """A constraint is a name and a version: no address, no file, no option."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not [pin for pin in pins() if pin.url]
    assert not [line for line in text.splitlines() if line.startswith("-")]


def test_the_library_imports_what_is_required_and_nothing_else(metadata):
    """Modules of third parties that the library imports at the top of a file are among the requirements."""
    module_of = {"pyyaml": "yaml", "nvidia-ml-py": "pynvml"}
    required = {canonicalize_name(r.name) for r in requirements_of(metadata) if holds(r, "3.11")}
    allowed = {module_of.get(name, name) for name in required} | {"mellow_ds", "shards"} | set(sys.stdlib_module_names)
    found = set()
    for top in ("mellow_ds", "shards"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                found |= {f"{path.relative_to(ROOT)}: {n}" for n in names if n.split(".")[0] not in allowed}
    assert not found, found


IMPORT_PROBE = """
import sys
from {module} import main
sys.argv = [{name!r}, *{arguments!r}]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print("code", code or 0, "heavy", sorted({{"torch", "deepspeed", "transformers", "webdataset"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("mellow_ds.cli.main", "mellow-ds", ["--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["train", "--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["evaluate", "--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["generate", "--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["convert", "--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["export", "--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["doctor", "--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["verify", "--help"]),
        ("mellow_ds.cli.main", "mellow-ds", ["verify", "equivalence", "--help"]),
        ("shards.cli", "mellow-shards", ["--help"]),
        ("shards.cli", "mellow-shards", ["build", "--help"]),
        ("shards.cli", "mellow-shards", ["synthesize", "--help"]),
        ("train", "train.py", ["--help"]),
    ],
)
def test_help_answers_without_torch(module, name, arguments):
    probe = IMPORT_PROBE.format(module=module, name=name, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *helped, last = done.stdout.strip().splitlines()
    assert last == "code 0 heavy []"
    assert "usage" in "\n".join(helped).lower()


def test_importing_the_library_imports_no_torch():
    probe = "import sys, mellow_ds, mellow_ds.config.load; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_train_py_takes_the_library_beside_it(tmp_path):
    """From any working directory, and whatever mellow-ds is installed: a clone runs its own code."""
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "mellow_ds" / "cli").mkdir(parents=True)
    (tmp_path / "mellow_ds" / "__init__.py").write_text("")
    (tmp_path / "mellow_ds" / "cli" / "__init__.py").write_text("")
    (tmp_path / "mellow_ds" / "cli" / "train.py").write_text(
        "def main():\n    print('the one beside')\n    return 85\n"
    )
    done = subprocess.run([sys.executable, str(tmp_path / "train.py")], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (85, "the one beside\n"), done.stderr


def test_the_shipped_recipes_are_there():
    assert {"quickstart", "digits", "mellow", "mellow-gpt2"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_loads(name):
    load_run_config(name)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_engine_json_parses(path):
    assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict)


def test_ci_runs_the_one_test_command():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["bash tests/run.sh"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_pre_commit_fetches_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert set(hooks) == {"ruff", "ruff-format", "mypy", "import-linter"}
    assert {hook["language"] for hook in hooks.values()} == {"system"}


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version = re.search(r'__version__ = "(.+)"', (ROOT / "mellow_ds" / "__init__.py").read_text()).group(1)
    assert citation["version"] == version
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2503.08540"
