"""How far a run is, for the person at the terminal: a bar, or a log line now and then where there is no terminal."""

import logging
import sys
from typing import Any

from mellow_ds.monitor.record import StepRecord


class Progress:
    """Shows steps with loss, learning rate, gradient norm, examples/s over all ranks and data wait."""

    def __init__(self, total_steps: int, resumed_step: int = 0, in_terminal: bool | None = None) -> None:
        """`in_terminal`: draw a bar; by default where stderr is a terminal. Else a log line a recorded step."""
        self._total_steps = total_steps
        self._logger = logging.getLogger("mellow_ds")
        self._bar: Any = None
        if sys.stderr.isatty() if in_terminal is None else in_terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=resumed_step, desc="training", unit="step", dynamic_ncols=True)

    def step(self, record: StepRecord) -> None:
        """Show one step."""
        if self._bar is not None:
            self._bar.update(record.step - self._bar.n)
            self._bar.set_postfix_str(describe(record))

    def line(self, record: StepRecord) -> None:
        """Show a recorded step, where there is no bar."""
        if self._bar is None:
            self._logger.info("step %d of %d: %s", record.step, self._total_steps, describe(record))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def describe(record: StepRecord) -> str:
    """One short line: loss, learning rate, gradient norm, examples/s over all ranks, share of time waiting for data."""
    text = (
        f"loss {record.loss:.4f} lr {record.learning_rate:.2e} norm {record.grad_norm:.2f} "
        f"{record.examples_per_second:.1f} ex/s wait {100 * record.data_wait_fraction:.0f}%"
    )
    if record.num_bad_samples:
        text += f" bad samples {record.num_bad_samples}"
    gpu = record.gpu
    if gpu is None:
        return text
    if gpu.gpu_memory_used_gib is not None:
        text += f" gpu {gpu.gpu_memory_used_gib:.1f} GiB"
    if gpu.gpu_utilisation_percent is not None:
        text += f" {gpu.gpu_utilisation_percent:.0f}%"
    if gpu.gpu_power_watts is not None:
        text += f" {gpu.gpu_power_watts:.0f} W"
    return text
