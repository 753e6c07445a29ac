"""The table of hosts: a line each, what differs marked, hosts that could not be asked among them."""

import dataclasses

from mellow_ds.preflight.report import as_json, format_report, table, verdict
from mellow_ds.preflight.rules import examine
from tests.preflight.made_survey import PACKAGES, plan_of, survey_of, well


def cells(line: str) -> list[str]:
    """Of a row; columns are two blanks apart, or more."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_line_a_host_and_a_mark_where_one_is_another() -> None:
    other = dataclasses.replace(well(3).facts.python, packages={**PACKAGES, "torch": "2.10.0", "numpy": "2.2.6"})
    lost = dataclasses.replace(well(4), problem="nobody knows this name: check its spelling")
    survey = survey_of(well(1), well(2), lost, well(3, python=other))
    head, *rows = table(survey)
    names = cells(head)
    by_host = {row.split()[0]: row for row in rows}
    assert list(by_host) == ["node1", "node2", "node4", "node3"]
    assert by_host["node4"] == "node4  *nobody knows this name: check its spelling"
    first, third = (dict(zip(names, cells(by_host[name]), strict=True)) for name in ("node1", "node3"))
    assert (first["torch"], first["packages"], first["meets"]) == ("2.11.0", "5 same", "listens")
    assert (third["torch"], third["packages"], third["meets"]) == ("*2.10.0", "*2 differ", "reached")
    assert [cell for cell in by_host["node1"].split() if cell.startswith("*")] == []
    assert third["GPUs"] == "4 x H100"
    assert third["address"] == "10.0.0.3"
    # every cell stands under its name
    assert by_host["node3"].index("*2.10.0") == head.index("torch")


def test_the_last_line_and_the_same_for_programs() -> None:
    good = survey_of(well(1), well(2))
    assert verdict(good, plan_of(good), []) == "2 hosts: nothing stops a run"
    assert verdict(good, plan_of(good, interface="ib0"), []) == "2 hosts: nothing stops a run with --interface ib0"
    bad = survey_of(well(1), dataclasses.replace(well(2), problem="gone: look"))
    found = examine(bad, plan_of(bad))
    text = format_report(bad, plan_of(bad), found)
    assert text.splitlines()[-1] == "2 hosts: 1 thing would stop a run"
    assert text.index("WILL NOT WORK") < text.index("host node2 cannot be used: gone") < text.index("cure: look")
    said = as_json(bad, found)
    assert [host["problem"] for host in said["hosts"]] == ["", "gone: look"]
    assert said["hosts"][0]["facts"]["python"]["packages"]["torch"] == "2.11.0"
    assert said["findings"][0]["code"] == "host-unreachable"
