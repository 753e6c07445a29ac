"""NCCL's own words about its network, as its documentation and reports of users have them."""

from pathlib import Path

import pytest

from mellow_ds.preflight.nccl_log import NcclLog, read_nccl_log, start_nccl_log

OVER_INFINIBAND = """
gpu1:1234:1234 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.1<0>
gpu1:1234:1299 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>
gpu1:1234:1299 [0] NCCL INFO Using network IB
"""
OVER_SOCKETS = """
gpu1:1:1 [0] NCCL INFO NET/IB : No device found.
gpu1:1:9 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
gpu1:1:9 [0] NCCL INFO Using network Socket
gpu1:1:9 [0] misc/socket.cc:484 NCCL WARN socketStartConnect: Connect to 10.0.0.2<41000> failed : No route to host
"""


def test_the_network_and_its_devices(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(OVER_INFINIBAND)
    assert read_nccl_log(tmp_path / "log") == NcclLog("IB", "[0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>")
    (tmp_path / "log").write_text(OVER_SOCKETS)
    found = read_nccl_log(tmp_path / "log")
    assert (found.network, found.devices) == ("Socket", "[0]eth0:10.0.0.1<0>")
    assert found.warnings == ("socketStartConnect: Connect to 10.0.0.2<41000> failed : No route to host",)
    assert read_nccl_log(tmp_path / "none") == NcclLog()


def test_what_a_user_asked_of_the_log_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ("NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_DEBUG", "TRACE")
    start_nccl_log(tmp_path)
    assert (os.environ["NCCL_DEBUG"], "NCCL_DEBUG_FILE" in os.environ) == ("TRACE", False)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("NCCL_DEBUG_SUBSYS", "")
    monkeypatch.setenv("NCCL_DEBUG_FILE", "")
    monkeypatch.delenv("NCCL_DEBUG_FILE")
    file = start_nccl_log(tmp_path)
    assert (os.environ["NCCL_DEBUG"], os.environ["NCCL_DEBUG_FILE"]) == ("INFO", str(file))
    monkeypatch.delenv("NCCL_DEBUG_FILE")
