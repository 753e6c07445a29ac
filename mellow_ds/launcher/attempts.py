"""Elastic restart: after a lost host the run goes on with those that are left, and with all again once they are back.

Each attempt is a `Watch` of its own: the same command, ranks placed anew. What a run needs to go on so, checkpoints and
a global batch that does not follow from the number of ranks, is the command's affair.
"""

import time
from collections.abc import Mapping, Sequence

from mellow_ds.errors import EXIT_FAULT
from mellow_ds.launcher.output import Output
from mellow_ds.launcher.plan import LaunchPlan, narrowed
from mellow_ds.launcher.stop_signals import StopSignals
from mellow_ds.launcher.watch import End, Watch


class Attempts:
    """A run from its first start to its last: one attempt, or with `plan.max_restarts` some more."""

    def __init__(
        self, plan: LaunchPlan, commands: Mapping[str, Sequence[str]], output: Output, stop_seconds: float
    ) -> None:
        """`commands`, `stop_seconds`: see `Watch`."""
        self._plan, self._commands, self._output = plan, commands, output
        self._stop_seconds = stop_seconds

    def run(self) -> int:
        """Returns the exit code of the last attempt. A rank that fails by itself, and a stop, end the run."""
        plan, num_restarts = self._plan, 0
        with StopSignals() as signals:
            while True:
                self._output.begin(plan, 1 + num_restarts)
                end = Watch(plan, self._commands, self._output, signals, self._stop_seconds).run()
                is_loss = bool(end.lost or (end.refused and num_restarts))
                if not is_loss or signals.asked or num_restarts == self._plan.max_restarts:
                    return self._give_up(end, num_restarts)
                num_restarts += 1
                self._output.note(
                    f"{_what(end)}; asking all hosts for restart {num_restarts} of {self._plan.max_restarts}"
                )
                usable = self._usable(end, signals)
                if signals.asked:
                    self._output.note("stopped before the restart; what is saved is the newest checkpoint")
                    return signals.exit_code
                if len(usable) < self._plan.min_hosts:
                    few = f"{len(usable)} of {len(self._plan.hosts)} hosts can go on"
                    few += f", --min-hosts is {self._plan.min_hosts}"
                    return self._give_up(end, num_restarts, few)
                plan = narrowed(self._plan, usable)
                self._output.note(
                    f"restart {num_restarts} of {self._plan.max_restarts}: {plan.num_ranks} ranks on "
                    f"{', '.join(host.name for host in plan.hosts)}"
                )

    def _usable(self, end: End, signals: StopSignals) -> frozenset[str]:
        """Names of the hosts that can start ranks; on those that do not answer all ranks have ended, too."""
        unusable = Watch(self._plan, self._commands, self._output, signals).ask()
        for name, why in unusable.items():
            self._output.note(f"host {name} is left out: {why}")
        if unusable and end.over_at > time.monotonic():
            signals.wait(end.over_at - time.monotonic())
        return frozenset(host.name for host in self._plan.hosts if host.name not in unusable)

    def _give_up(self, end: End, num_restarts: int, why: str = "") -> int:
        """Say what the run came to, where no rank has said it."""
        if end.lost:
            why = why or (f"restarted {num_restarts} times already" if num_restarts else "")
            self._output.error(f"{end.lost}; the other ranks were ended" + (f"; {why}" if why else ""))
        for refused in end.refused:
            self._output.error(f"{refused}; no rank was started" + (" again" if num_restarts else ""))
        return EXIT_FAULT if num_restarts and end.refused else end.code


def _what(end: End) -> str:
    return end.lost or "; ".join(end.refused)
