"""torchrun as the scripts of launch/ run it: with the exit code of the rank that failed first, and saving on a signal.

    python -m mellow_ds.launcher.torchrun [options of torchrun] train.py ...

torchrun itself ends with 1 whatever its ranks say, and where it is told to stop it gives them 30 s and forgets their
codes. Here SIGINT, SIGTERM, SIGHUP and SIGUSR1 go to the ranks, which save and end with 130 or 85; so does this.
"""

import contextlib
import os
import signal
import sys
from types import FrameType

from mellow_ds.errors import EXIT_DONE, EXIT_FAULT, EXIT_INTERRUPTED, EXIT_STOPPED
from mellow_ds.monitor.process_id import ProcessId, ancestors, descendants
from mellow_ds.stopping import turn_deaf

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def main(arguments: list[str], signals_reach_ranks: bool = False) -> int:
    """Run torchrun; returns the exit code (128 and the signal where one ended the rank).

    `signals_reach_ranks`: they get what this process gets, from whoever sends it; twice would end them at once.
    """
    for number in _PASSED_ON:
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # by nohup
        signal.signal(number, _wait_for_ranks if signals_reach_ranks else _pass_on)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--signals-to-handle=SIGQUIT", *arguments])
    except ChildFailedError as failed:
        code = int(failed.get_first_failure()[1].exitcode)
        return (code if code > 0 else 128 - code) or EXIT_FAULT
    finally:
        turn_deaf()
    return EXIT_DONE


def _wait_for_ranks(number: int, _frame: FrameType | None) -> list[ProcessId]:
    """Those that there are; before there are any this process ends."""
    own = os.getpid()
    ranks = [process for process in descendants(own) if [above.pid for above in ancestors(process.pid)][:1] == [own]]
    if not ranks:
        raise SystemExit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED)
    return ranks


def _pass_on(number: int, frame: FrameType | None) -> None:
    """To the ranks; before there are any this process ends."""
    for rank in _wait_for_ranks(number, frame):
        with contextlib.suppress(ProcessLookupError):
            # a rank knows no SIGHUP, which says the same as SIGTERM
            os.kill(rank.pid, signal.SIGTERM if number == signal.SIGHUP else number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
