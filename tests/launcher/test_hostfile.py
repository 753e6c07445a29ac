"""DeepSpeed's hostfile syntax and filters, and what is refused."""

from pathlib import Path

import pytest

from mellow_ds.errors import ConfigError
from mellow_ds.launcher.hostfile import Host, filter_hosts, limit_slots, read_hostfile

HOSTS = [Host("a", (0, 1, 2, 3)), Host("b", (0, 1)), Host("c", (0, 1))]


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_line_a_host_with_comments_and_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "# the cluster\nnode-1.site slots=2\n\n  10.0.0.7\tslots = 1 # old\n")
    assert read_hostfile(path) == [Host("node-1.site", (0, 1)), Host("10.0.0.7", (0,))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb\n", "hosts:2: 'b' is not `name slots=N`"),
        ("a slots=two\n", "hosts:1: slots=two of host a is not a number above 0"),
        ("a slots=0\n", "hosts:1: slots=0 of host a is not a number above 0"),
        ("a slots=-1\n", "hosts:1: slots=-1 of host a is not a number above 0"),
        ("a slots=1\na slots=2\n", "hosts:2: host a stands there twice"),
        ("-oProxyCommand=x slots=1\n", "hosts:1: '-oProxyCommand=x' is not the name of a host"),
        ("a;reboot slots=1\n", "hosts:1: 'a;reboot' is not the name of a host"),
        ("$(reboot) slots=1\n", "hosts:1: '$(reboot)' is not the name of a host"),
        ("me@a slots=1\n", "hosts:1: 'me@a' is not the name of a host"),
        ("a slots=1 port=2\n", "hosts:1: 'a slots=1 port=2' is not `name slots=N`"),
        ("# nobody\n", "names no host"),
    ],
)
def test_what_is_no_hostfile_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_hostfile(written(tmp_path, text))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_hostfile_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothere is not there: write a line a host"):
        read_hostfile(tmp_path / "nothere")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", {"a": (0, 1, 2, 3), "b": (0, 1), "c": (0, 1)}),
        ("b@a:3,1", "", {"a": (1, 3), "b": (0, 1)}),
        ("", "b@a:0", {"a": (1, 2, 3), "c": (0, 1)}),
        ("", "a:0,1,2,3", {"b": (0, 1), "c": (0, 1)}),
    ],
)
def test_filters_leave_hosts_in_the_order_of_the_file(
    include: str, exclude: str, left: dict[str, tuple[int, ...]]
) -> None:
    hosts = filter_hosts(HOSTS, include, exclude)
    assert {host.name: host.slots for host in hosts} == left
    assert [host.name for host in hosts] == sorted(left)
    assert {host.name for host in hosts if host.is_narrowed} == {
        host.name for host in hosts if len(host.slots) < len(next(h.slots for h in HOSTS if h.name == host.name))
    }


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("a", "b", "give one of the two"),
        ("d", "", "--include names host 'd', which the hostfile does not have: a, b, c"),
        ("b:2", "", "--include names slot '2' of host b, which has slots 0 to 1"),
        ("a:x", "", "slot 'x' of host a"),
        ("a:", "", "slot '' of host a"),
        ("a:0@a:1", "", "--include names host a twice"),
        ("", "a@b@c", "--exclude a@b@c leaves no host"),
    ],
)
def test_filters_that_do_not_fit_are_refused(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        filter_hosts(HOSTS, include, exclude)
    assert message in str(refused.value)


def test_fewer_processes_than_slots() -> None:
    assert [host.slots for host in limit_slots(HOSTS, 1)] == [(0,), (0,), (0,)]
    with pytest.raises(ConfigError, match="host b has 2 slots"):
        limit_slots(HOSTS, 3)
    with pytest.raises(ConfigError, match="must be above 0"):
        limit_slots(HOSTS, 0)
