"""Where the synthetic corpus takes its chance from: named streams, and draws that are balanced by construction.

Every draw is a function of what it is for (seed, split, clip, purpose), never of the order in which things are made; so
a clip is the same whichever process makes it, and however many others there are.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mellow_ds.prompt import draw_number

Choice = TypeVar("Choice")


def stream(*key: object) -> np.random.Generator:
    """The random stream named by `key`; different keys give independent streams."""
    return np.random.default_rng(draw_number("synthesis", *key))


def balanced_choice(choices: Sequence[Choice], position: int, *key: object) -> Choice:
    """The draw number `position` (0, 1, ...) of the series named by `key`.

    Every run of `len(choices)` draws from a multiple of that length on holds each choice once, in a random order: the
    counts of a series differ by at most one, where independent draws would give a text-only guess a few percent.
    """
    block, place = divmod(position, len(choices))
    order = stream("balanced", *key, block).permutation(len(choices))
    return choices[int(order[place])]


def log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A number between the two positive bounds, uniform in its logarithm."""
    low, high = bounds
    return float(low * (high / low) ** rng.random())
