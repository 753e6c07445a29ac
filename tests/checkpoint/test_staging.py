"""Memory that is used again: pieces do not overlap, and the second round takes no more than the first."""

import torch

from mellow_ds.checkpoint.staging import Staging

SHAPES = [
    ((3, 5), torch.float32),
    ((), torch.int64),
    ((17_000_000,), torch.float32),
    ((7,), torch.int16),
    ((0,), torch.float32),
]


def test_pieces_do_not_overlap_and_come_again() -> None:
    staging = Staging()
    rounds = []
    for _ in range(2):
        staging.reset()
        pieces = [staging.empty(torch.Size(shape), dtype) for shape, dtype in SHAPES * 2]
        for number, piece in enumerate(pieces):
            piece.fill_(number)
        assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))
        assert [(tuple(piece.shape), piece.dtype) for piece in pieces] == SHAPES * 2
        rounds.append(([piece.data_ptr() for piece in pieces], staging.num_bytes))
    assert rounds[0] == rounds[1]
    assert rounds[0][1] <= 2 * 17_000_000 * 4 + 3 * (64 << 20)
