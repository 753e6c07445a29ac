"""Dynamic loss scaling for float16 where DeepSpeed does not do it; the engine JSON's fp16 section sets it up."""

from typing import Any

_FACTOR = 2.0


class LossScale:
    """What the loss is multiplied by before the backward pass: halved at an overflow, doubled after a while without.

    Defaults are DeepSpeed's (initial scale 2 ** 16, a window of 1000 steps, a floor of 1), and so are the names of its
    state: a checkpoint of either back end goes on in the other.
    """

    def __init__(self, section: dict[str, Any]) -> None:
        """`section`: "fp16" of the engine JSON."""
        fixed = float(section.get("loss_scale", 0) or 0)
        self.dynamic = not fixed
        self.current = fixed or 2.0 ** float(section.get("initial_scale_power", 16))
        self._window = int(section.get("loss_scale_window", 1000))
        self._floor = float(section.get("min_loss_scale", 1))
        self._step = 0
        self._last_overflow = -1

    def update(self, overflowed: bool) -> None:
        """Tell how the step went."""
        if not self.dynamic:
            return
        if overflowed:
            self.current = max(self.current / _FACTOR, self._floor)
            self._last_overflow = self._step
        elif (self._step - self._last_overflow) % self._window == 0:
            self.current *= _FACTOR
        self._step += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; empty where the scale is fixed."""
        if not self.dynamic:
            return {}
        return {
            "cur_scale": self.current,
            "cur_iter": float(self._step),
            "last_overflow_iter": float(self._last_overflow),
            "cur_hysteresis": 1.0,
        }

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        if self.dynamic and state:
            self.current = state["cur_scale"]
            self._step, self._last_overflow = int(state["cur_iter"]), int(state["last_overflow_iter"])
