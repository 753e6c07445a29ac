"""train.py for tests of launchers: works until it is ended, without torch; holds on to its launcher as train.py does.

It stands as `train.py` in a copy of the clone, where the scripts of launch/ find it.
"""

import os
import sys
import time
from pathlib import Path

from mellow_ds.launcher.lifeline import hold_on
from mellow_ds.stopping import StopRequest
from mellow_ds.world import World

LEAVE_SECONDS = 5.0


def main() -> int:
    """Be a rank: a step every half second, and after a signal a moment for the save, from which all leave together."""
    stop = StopRequest()
    stop.listen()
    hold_on(lambda: stop.exit_code)
    world = World.from_env()
    print("at work", world.rank, sys.argv[1:], flush=True)
    while not stop.exit_code:
        time.sleep(0.5)
    time.sleep(1)
    print("saved", flush=True)
    wait_for_others(world)
    return stop.exit_code


def wait_for_others(world: World) -> None:
    """Until all ranks have saved, as far as they live: a launcher ends the others as soon as one has left."""
    folder = Path(__file__).parent / f"saved-{os.environ['MASTER_PORT']}"
    folder.mkdir(exist_ok=True)
    (folder / str(world.rank)).touch()
    deadline = time.monotonic() + LEAVE_SECONDS
    while len(list(folder.iterdir())) < world.size and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
