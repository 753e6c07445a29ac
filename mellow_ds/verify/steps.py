"""The optimizer steps that are compared: which examples, at which rate, how a world and an accumulation cut them."""

from itertools import pairwise

from mellow_ds.data.batch import Batch
from mellow_ds.verify.small import TRAIN, batch_of
from mellow_ds.world import World

NUM_STEPS = 20
_BATCH = 9  # does not divide by any world or accumulation above 1
_LAST_BATCH = 3  # of an epoch: with 4 ranks or 4 micro-batches some are empty
_STEPS_OF_EPOCH = 4
_WARM_UP = 5


def examples_of(step: int) -> list[int]:
    """Numbers of the examples of a step: new ones in every step, fewer in the last one of an epoch."""
    count = _LAST_BATCH if step % _STEPS_OF_EPOCH == _STEPS_OF_EPOCH - 1 else _BATCH
    return list(range(_BATCH * step, _BATCH * step + count))


def learning_rate_of(step: int) -> float:
    """A warm-up, then falling by a tenth a step."""
    return TRAIN.learning_rate * min((step + 1) / _WARM_UP, 0.9 ** (step + 1 - _WARM_UP))


def micro_batches(numbers: list[int], world: World, accumulation: int, audio_tokens: int) -> list[Batch]:
    """This rank's part of a step: contiguous, in parts that differ by one example, some of them empty."""
    n = len(numbers)
    own = numbers[n * world.rank // world.size : n * (world.rank + 1) // world.size]
    cuts = [len(own) * part // accumulation for part in range(accumulation + 1)]
    return [batch_of(own[a:b], audio_tokens) for a, b in pairwise(cuts)]
