"""Places of ranks, and the variables that tell them."""

import pytest

from mellow_ds.errors import ConfigError
from mellow_ds.launcher.hostfile import Host
from mellow_ds.launcher.plan import LaunchPlan, choose_master, narrowed, place_ranks, rank_command


def test_ranks_are_counted_through_the_hosts() -> None:
    hosts = place_ranks([Host("a", (0, 1)), Host("b", (1, 3), is_narrowed=True), Host("c", (0,))])
    plan = LaunchPlan(hosts, ("python", "x.py"), "/f", master_address="a", launch_id="7f")
    assert [list(host.ranks) for host in plan.hosts] == [[0, 1], [2, 3], [4]]
    assert plan.num_ranks == 5
    assert plan.variables(3, 1234) == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
        "MASTER_PORT": "1234", "MELLOW_LAUNCH_ID": "7f", "CUDA_VISIBLE_DEVICES": "1,3",
    }  # fmt: skip
    assert "CUDA_VISIBLE_DEVICES" not in plan.variables(4, 1234)
    assert plan.label(4) == "rank 4 on host c"


def test_a_restart_on_fewer_hosts_counts_anew_and_meets_at_the_first_that_is_left() -> None:
    hosts = place_ranks([Host("a", (0, 1)), Host("b", (1, 3), is_narrowed=True), Host("c", (0,))])
    plan = LaunchPlan(hosts, ("x",), "/f", master_address="10.0.0.1", is_port_fixed=True, launch_id="7f")
    without_b = narrowed(plan, {"a", "c"})
    assert [(host.name, list(host.ranks)) for host in without_b.hosts] == [("a", [0, 1]), ("c", [2])]
    assert (without_b.master_address, without_b.is_port_fixed, without_b.launch_id) == ("10.0.0.1", False, "7f")
    without_a = narrowed(plan, {"b", "c"})
    assert [(host.name, list(host.ranks), host.devices) for host in without_a.hosts] == [
        ("b", [0, 1], (1, 3)), ("c", [2], ()),
    ]  # fmt: skip
    assert without_a.master_address == "b"
    assert [host.name for host in narrowed(plan, {"a", "b", "c"}).hosts] == ["a", "b", "c"]


def test_the_ranks_meet_at_the_first_host() -> None:
    here, there = Host("localhost", (0,)), Host("b", (0,))
    assert choose_master([there, here]) == "b"
    assert choose_master([here]) == "127.0.0.1"
    assert choose_master([here, there], "10.0.0.1") == "10.0.0.1"
    with pytest.raises(ConfigError, match="--master-addr"):
        choose_master([here, there])


def test_a_script_gets_the_interpreter() -> None:
    assert rank_command(["train.py", "--x"], "/p/python") == ("/p/python", "train.py", "--x")
    assert rank_command(["mellow-ds", "train"], "/p/python") == ("mellow-ds", "train")
    with pytest.raises(ConfigError, match="no command is given"):
        rank_command([], "python")


def test_an_interface_binds_both_libraries() -> None:
    plan = LaunchPlan(place_ranks([Host("a", (0,))]), ("x",), "/f", interface="ib0")
    assert plan.interfaces() == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
