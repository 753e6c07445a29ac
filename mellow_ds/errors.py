"""What can go wrong, and the exit code that each kind of it ends with.

A `MellowError` is one line for a person: what was found, where, and what to do. Commands print it without a traceback.
"""

import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_STOPPED = 85  # state saved; start again to go on
EXIT_INTERRUPTED = 130


class MellowError(Exception):
    """A user's mistake or unusable input: one line, exit code 2."""

    exit_code = EXIT_USER


class ConfigError(MellowError):
    """A run configuration, recipe, override or engine JSON that cannot be used; names the key."""


class ShardError(MellowError):
    """A shard folder, manifest, index or sample that is missing or not what its manifest says; names the file."""


class PackingError(MellowError):
    """Records or audio that cannot be packed; names the file or record."""


class CheckpointError(MellowError):
    """A checkpoint that is missing, damaged or of another model; names the file."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written; says what it takes and what is kept. Exit code 1."""

    exit_code = EXIT_FAULT


class FaultError(MellowError):
    """Something broke that was not the user's doing (a full disk, a dead peer): one line, exit code 1."""

    exit_code = EXIT_FAULT


def run_command(main: Callable[[], int]) -> int:
    """Run `main` and turn a `MellowError` into one line on stderr and its exit code, Ctrl-C into 130."""
    try:
        return main()
    except MellowError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        # `mellow-shards inspect | head`: the reader has gone, which is not our failure
        sys.stderr.close()
        return EXIT_DONE
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
