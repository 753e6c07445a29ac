"""An order that is larger than a pipe arrives whole, beat by beat."""

import sys
import time
from pathlib import Path

from mellow_ds.launcher.connection import Connection
from mellow_ds.launcher.plan import HostPlan

# takes its input late and slowly, then says how long the first line was
SLOW = "import sys, time; time.sleep(0.5); n = len(sys.stdin.buffer.readline()); open(sys.argv[1], 'w').write(str(n))"


def test_a_large_order_arrives_whole(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    connection = Connection(HostPlan("here", 0, 1), [sys.executable, "-c", SLOW, str(answer)])
    connection.send({"do": "start", "command": ["x" * 500_000]})
    deadline = time.monotonic() + 20
    while not answer.exists():
        assert time.monotonic() < deadline
        connection.send({"do": "beat"})
        time.sleep(0.05)
    assert connection.exit_code(10) == 0
    assert int(answer.read_text()) > 500_000
    connection.close()
