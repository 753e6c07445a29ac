"""Waiting for a signal that asks for a stop, while other signals come."""

import os
import signal
import subprocess
import threading
import time

from mellow_ds.launcher.stop_signals import StopSignals


def test_what_asks_for_nothing_does_not_cut_a_wait_short() -> None:
    """A child that ends wakes whoever waits, where Python handles SIGCHLD."""
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with StopSignals() as signals:
            began = time.monotonic()
            child = subprocess.Popen(["true"])
            assert not signals.wait(0.5)
            assert time.monotonic() - began >= 0.5
            child.wait()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_request_ends_a_wait() -> None:
    with StopSignals() as signals:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        assert signals.wait(30)
        assert time.monotonic() - began < 20
        assert signals.wait(30)  # and every later one at once
        assert signals.exit_code == 85
