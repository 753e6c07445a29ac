"""What an agent finds on its host before it starts ranks; whole agents at work are in test_watch and test_attempts."""

import os
import subprocess
import threading

from mellow_ds.launcher.agent import _wait_until_gone


def test_ranks_of_an_attempt_before_are_waited_for() -> None:
    def rank(seconds: float) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", str(seconds)], env={**os.environ, "MELLOW_LAUNCH_ID": "7f3a"})

    assert _wait_until_gone("7f3a", 0)
    short = rank(60)
    try:
        assert _wait_until_gone("7f3", 0)  # another launch
        assert not _wait_until_gone("7f3a", 0.1)
        threading.Timer(0.5, short.kill).start()
        assert _wait_until_gone("7f3a", 30)
    finally:
        short.kill()
        short.wait()
