"""CPU memory that one save after the other is copied into.

Memory that is new to the process costs several times as much to get as to fill (on two CPU ranks 1.5 s a gigabyte to
0.2 s), and training waits for it; so it is kept from the first save on.
"""

import math

import torch

_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 64


class Staging:
    """Hands out pieces of memory, the same ones again after `reset`."""

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self._chunk = 0  # the one in use
        self._used = 0  # bytes of it

    @property
    def num_bytes(self) -> int:
        """Held in all."""
        return sum(chunk.numel() for chunk in self._chunks)

    def reset(self) -> None:
        """Everything that was handed out is free again."""
        self._chunk = self._used = 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape, not set."""
        num_bytes = math.prod(shape) * dtype.itemsize
        while self._chunk < len(self._chunks) and self._used + num_bytes > self._chunks[self._chunk].numel():
            self._chunk, self._used = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(num_bytes, _CHUNK_BYTES), dtype=torch.uint8))
        piece = self._chunks[self._chunk][self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(shape)
