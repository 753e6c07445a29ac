"""TensorBoard logs of a run. torch and tensorboard are imported when a writer is made, not before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TENSORBOARD_NAME = "tensorboard"


class TensorBoard:
    """Scalars and texts by step, in event files of `folder`."""

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        """`resumed_step`: what earlier event files of the folder say of later steps is void to readers."""
        from torch.utils.tensorboard import SummaryWriter

        # flushed often: a killed run should leave its last minute
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1, flush_secs=20)

    def scalars(self, prefix: str, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among `values` as `prefix/name`."""
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def text(self, tag: str, step: int, text: str) -> None:
        """Write a text (Markdown)."""
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
