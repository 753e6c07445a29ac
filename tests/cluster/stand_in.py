"""train.py for tests of launchers: works until it is ended, without torch; holds on to its launcher as train.py does.

It stands as `train.py` in a copy of the clone, where the scripts of launch/ find it.
"""

import os
import sys
import time

from mellow_ds.launcher.lifeline import hold_on
from mellow_ds.stopping import StopRequest


def main() -> int:
    """Be a rank: a step every half second, and after a signal a moment for the save."""
    stop = StopRequest()
    stop.listen()
    hold_on(lambda: stop.exit_code)
    print("at work", os.environ["RANK"], sys.argv[1:], flush=True)
    while not stop.exit_code:
        time.sleep(0.5)
    time.sleep(1)
    print("saved", flush=True)
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(main())
