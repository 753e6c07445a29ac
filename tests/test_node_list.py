"""SLURM's node lists, beside what its own program makes of them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mellow_ds.errors import ConfigError
from mellow_ds.node_list import expand_counts, expand_node_list

LISTS = {
    "n1": ["n1"],
    "gpu[003-005,009],login1": ["gpu003", "gpu004", "gpu005", "gpu009", "login1"],
    "r[1-2]n[01-04]": ["r1n01", "r1n02", "r1n03", "r1n04", "r2n01", "r2n02", "r2n03", "r2n04"],
    "a[1-2][3-4]": ["a13", "a14", "a23", "a24"],
    "n[9-11]": ["n9", "n10", "n11"],
    "n[09-11]": ["n09", "n10", "n11"],
    "n[98-101]": ["n98", "n99", "n100", "n101"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
    "a-b[7]": ["a-b7"],
    "x,,y": ["x", "y"],
    "[1-3]": ["1", "2", "3"],
    "n[1-2,5-6]x[08-09],z9": ["n1x08", "n1x09", "n2x08", "n2x09", "n5x08", "n5x09", "n6x08", "n6x09", "z9"],
    "node[2,1]": ["node2", "node1"],
}


@pytest.mark.parametrize("text", LISTS)
def test_a_list_is_expanded(text: str) -> None:
    assert expand_node_list(text) == LISTS[text]


def test_scontrol_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("scontrol") is None:
        pytest.skip("scontrol is not installed (Debian: slurm-client)")
    configuration = tmp_path / "slurm.conf"  # without one it looks for a cluster's in the network
    configuration.write_text("ClusterName=test\nSlurmctldHost=localhost\n")
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    for text, hosts in LISTS.items():
        said = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True, check=True)
        assert said.stdout.split() == hosts, text


def test_what_follows_a_bracket_belongs_to_the_name() -> None:
    assert expand_node_list("n[1-2]-ib,m[3]x") == ["n1-ib", "n2-ib", "m3x"]


@pytest.mark.parametrize(
    "text", ["", ",", "n[1", "n1]", "n[5-3]", "n[a-c]", "n[1-2,]", "n[]", "n[1-9999999999]", "n[0-99999]",
             "a[0-999]b[0-999]", "n[[1]]", "n[1-2-3]", "n[-1]", "a b"],
)  # fmt: skip
def test_what_is_no_list_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST is '") as refused:
        expand_node_list(text, "SLURM_STEP_NODELIST")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("4(x2),3", [4, 4, 3]), ("1,2(x3),1", [1, 2, 2, 2, 1]), ("2(x1)", [2])]
)
def test_counts_of_nodes(text: str, counts: list[int]) -> None:
    assert expand_counts(text, "N") == counts


@pytest.mark.parametrize("text", ["", "4(x2", "x", "4(x2),", "-1", "1(x999999),1(x999999)"])
def test_what_are_no_counts_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_TASKS_PER_NODE is"):
        expand_counts(text, "SLURM_TASKS_PER_NODE")
