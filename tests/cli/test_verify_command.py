"""`mellow-ds verify`: what it is asked, what it writes, and how it ends. What it compares is tested in tests/verify."""

import json
from pathlib import Path

import pytest

from mellow_ds.cli.verify import main, parse_arguments
from mellow_ds.verify import equivalence
from mellow_ds.verify.back_ends import BACK_ENDS
from mellow_ds.verify.equivalence import Case, Difference


def test_numbers_are_read_sorted_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_arguments(["equivalence", "--worlds", "4,1,2", "--accumulations", "2"], "mellow-ds verify")
    assert (options.worlds, options.accumulations, options.steps) == ((1, 2, 4), (2,), 20)
    for wrong in (["equivalence", "--worlds", "0"], ["resume", "--world", "x"], []):
        with pytest.raises(SystemExit) as ended:
            parse_arguments(wrong, "mellow-ds verify")
        assert ended.value.code == 2
    assert "invalid" in capsys.readouterr().err


@pytest.mark.parametrize(("loss", "code"), [(3e-8, 0), (3e-5, 1)])
def test_a_difference_past_the_tolerance_ends_with_code_1(
    loss: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):  # the command sets them; they are taken back
        monkeypatch.setenv(name, "")
    rows = [Difference(Case(BACK_ENDS[3], 2, 4), loss, 1e-8, 1e-7, True)]
    monkeypatch.setattr(equivalence, "compare", lambda *_: rows)
    found = main(["equivalence", "--steps", "1", "--json", str(tmp_path / "found.json")], "mellow-ds verify")
    said = capsys.readouterr().out
    assert found == code
    assert "ZeRO-3" in said
    assert ("PAST THE TOLERANCE" in said) == bool(code)
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["is_well"] == (not code)
    assert written["rows"][0]["case"]["back_end"]["name"] == "ZeRO-3"
