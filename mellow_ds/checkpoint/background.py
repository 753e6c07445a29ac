"""One action on a thread of its own, beside training."""

import threading
from collections.abc import Callable


class BackgroundTask:
    """Runs `action` at once; what it raises is kept."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self._action = action
        # daemon: a rank that has failed ends at once; a step that all ranks have written is published at the next start
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Return when it has ended, or after `seconds`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._action()
        except Exception as error:  # of any kind: it is told on the training thread
            self.error = error
