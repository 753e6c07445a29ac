"""The packing benchmark runs, and says how the build compares with the bare loop."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_a_short_run_writes_its_result(tmp_path: Path, codec: str) -> None:
    out = tmp_path / "pack.json"
    given = ["--clips", "4", "--rounds", "2", "--clip-seconds", "1", "--codec", codec, "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "pack.py"), *given, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result["benchmark"], result["codec"], result["num_questions"]) == ("pack", codec, 72)
    assert [len(values) for values in result["seconds"].values()] == [2, 2]
    assert 0 < result["share_of_bare_rate"] < 2
    assert "build / bare loop" in done.stdout
