"""Asking hosts of which some hang, talk nonsense or lack the code: what the others say is not lost for it."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mellow_ds.launcher.environment import choose_variables
from mellow_ds.launcher.plan import HostPlan, LaunchPlan
from mellow_ds.preflight import survey
from mellow_ds.preflight.survey import Survey, Surveyor
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
REAL = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", survey.PROBE]
SAYS_HELLO = 'printf \'\\036{"is": "hello"}\\n\'; '


def ask(tmp_path: Path, **commands: list[str]) -> Survey:
    plan = LaunchPlan(
        hosts=tuple(HostPlan(name, place, 1) for place, name in enumerate(commands)),
        command=("true",),
        folder=str(tmp_path),
        travelling=choose_variables(os.environ),
        master_address="127.0.0.1",
        master_port=free_port(),
    )
    return Surveyor(plan, commands, [str(tmp_path)]).run()


def test_hosts_that_hang_or_talk_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "LOOK_SECONDS", 10.0)
    began = time.monotonic()
    found = ask(
        tmp_path,
        well=REAL,
        hangs=["sleep", "600"],
        stops=["sh", "-c", SAYS_HELLO + "exec sleep 600"],
        greets=["sh", "-c", "echo welcome to this host; echo '{\"is\": 3}'; exec " + " ".join(REAL)],
        old=["sh", "-c", 'echo "python: No module named mellow_ds.preflight" >&2; exit 1'],
        raving=["sh", "-c", 'printf \'\\036{"is": "fact"}\\n\\036[]\\n\\036{"is": "hello"}\\n\'; exit 3'],
    )
    assert time.monotonic() - began < 60
    problems = {host.name: host.problem for host in found.hosts}
    assert problems["well"] == problems["greets"] == ""
    assert problems["hangs"].startswith("no answer within 10 s")
    assert problems["stops"].startswith("it has stopped answering")
    assert problems["old"].startswith("the clone there is of another commit")
    assert problems["raving"].startswith("the connection ended with code 3")
    assert [host.name for host in found.reached] == ["well", "greets"]
    assert all(host.facts.python.executable for host in found.reached)
    assert found.hosts[3].meeting is not None
    assert found.hosts[3].meeting.is_right
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_is_late_once_does_not_hold_up_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells of itself and then stops: it is asked for the shared folder, the port and the first host in vain."""
    monkeypatch.setattr(survey, "_LATE_SECONDS", 0.2)
    lasted = []
    honest = Surveyor._until

    def timed(surveyor: Surveyor, *arguments: Any) -> None:
        began = time.monotonic()
        honest(surveyor, *arguments)
        lasted.append(time.monotonic() - began)

    monkeypatch.setattr(Surveyor, "_until", timed)
    stub = (
        "read line; " + SAYS_HELLO + "for n in 1 2 3 4 5; do read line; "
        'printf \'\\036{"is": "time", "at": 0}\\n\'; done; read line; '
        'printf \'\\036{"is": "looking", "at": []}\\n\'; exec sleep 600'
    )
    found = ask(tmp_path, well=REAL, late=["sh", "-c", stub])
    assert len([seconds for seconds in lasted[1:] if seconds > survey._ROUND_SECONDS]) == 1  # the first is the look
    late = found.hosts[1]
    assert late.problem == ""
    assert late.missing == (f"folder shared {tmp_path}",)
    assert late.shares == {}
    assert late.meeting is not None
    assert late.meeting.why == "it does not answer itself"
    assert found.hosts[0].shares == {str(tmp_path): True}


def test_a_launcher_that_is_gone_leaves_no_mark_and_no_probe(tmp_path: Path) -> None:
    """The probe has marked a folder when its questions end."""
    import json
    import subprocess

    probe = subprocess.Popen(REAL, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
    assert probe.stdin is not None
    assert probe.stdout is not None
    orders = [
        {"do": "be", "under": {}, "over": {}},
        {"do": "mark", "folders": [str(tmp_path)], "name": "mark", "word": "w"},
    ]
    probe.stdin.write(b"".join(json.dumps(order).encode() + b"\n" for order in orders))
    probe.stdin.flush()
    said = [json.loads(probe.stdout.readline().lstrip(b"\x1e")) for _ in range(2)]
    assert said[1] == {"is": "marked", "folder": str(tmp_path), "why": ""}
    assert (tmp_path / "mark").read_text() == "w"
    probe.stdin.close()
    assert probe.wait(20) == 0
    probe.stdout.close()
    assert list(tmp_path.iterdir()) == []
