"""argparse as all commands use it: a mistake on the command line is one line, which names the option that was meant."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mellow_ds.errors import EXIT_USER


class OptionParser(argparse.ArgumentParser):
    """An `ArgumentParser` that ends with `error: COMMAND: what is wrong; see COMMAND --help` and code 2."""

    _words: Sequence[str] = ()

    # (the stub has overloads for what `namespace` is)
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse; remembers what was given."""
        self._words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say it and end; a wrong name comes before what is missing because of it."""
        if message.startswith(("the following arguments are required", "unrecognized arguments")):
            message = self._describe_unknown() or message
        self.exit(EXIT_USER, f"error: {self.prog}: {message}; see {self.prog} --help\n")

    def _describe_unknown(self) -> str:
        known = list(self._option_string_actions)
        names = [word.partition("=")[0] for word in self._words if word.startswith("--") and word != "--"]
        unknown = [name for name in names if not any(option.startswith(name) for option in known)]
        if not unknown:
            return ""
        near = difflib.get_close_matches(unknown[0], known, n=1)
        return f"{unknown[0]} is not one of its options" + (f"; did you mean {near[0]}?" if near else "")
