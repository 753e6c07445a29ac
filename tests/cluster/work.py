"""A stand-in for train.py that needs no torch: `work.py [stubborn | stops] ...` says that it works until it is ended.

`stubborn`: ignores every signal that can be ignored, as a rank does that hangs in a collective, and has an orphan that
does too. `stops`: takes SIGINT and SIGTERM as train.py does (130 and 85 after a moment for the save).
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Be a rank."""
    mode = sys.argv[1]
    if mode == "stubborn":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            if os.fork() > 0:
                os._exit(0)
            time.sleep(600)
            os._exit(0)
    elif mode == "stops":
        for number, code in ((signal.SIGTERM, 85), (signal.SIGINT, 130)):
            signal.signal(number, lambda *_, code=code: (time.sleep(1), print("saved", flush=True), sys.exit(code)))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MELLOW_TOLD")
    print("at work", {name: os.environ.get(name) for name in names}, str(Path.cwd()), sys.argv[2:], flush=True)
    if mode != "ends":
        time.sleep(600)


if __name__ == "__main__":
    main()
