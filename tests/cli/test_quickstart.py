"""launch/quickstart.sh is checked whole by hand (docs/results.md); here: that it says what it is and parses."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "launch" / "quickstart.sh"


def test_help_tells_what_it_does_and_makes_nothing(tmp_path: Path) -> None:
    result = subprocess.run(["bash", SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "bash launch/quickstart.sh [FOLDER]" in result.stdout
    assert not list(tmp_path.iterdir())


def test_every_command_in_it_parses() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
