"""What the ranks of a run tell each other about checkpoints: collective calls, on the training thread only."""

import torch
import torch.distributed as dist

from mellow_ds.world import World

_TEXT_BYTES = 1000  # of a rank's message; longer ones are cut


class Peers:
    """All ranks call the same methods in the same order. A world of one needs no process group."""

    def __init__(self, world: World, device: torch.device | str = "cpu") -> None:
        """`device`: where the backend's collectives take tensors."""
        self.world = world
        self._device = torch.device(device)

    def all_ok(self, ok: bool) -> bool:
        """Whether all ranks are well; none goes on before the others have come here."""
        if self.world.size == 1:
            return ok
        flag = torch.tensor(int(ok), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def texts(self, text: str) -> list[str]:
        """The text of every rank, in order of ranks, each cut at 1,000 bytes."""
        content = text.encode()[:_TEXT_BYTES]
        # int32: NCCL and gloo both add it up
        rows = torch.zeros(self.world.size, _TEXT_BYTES, dtype=torch.int32)
        rows[self.world.rank, : len(content)] = torch.tensor(list(content), dtype=torch.int32)
        if self.world.size > 1:
            rows = rows.to(self._device)
            dist.all_reduce(rows)
        return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows.tolist()]

    def from_main(self, numbers: list[int]) -> list[int]:
        """The numbers that rank 0 brought."""
        if self.world.size == 1:
            return numbers
        length = torch.tensor(len(numbers), device=self._device)
        dist.broadcast(length, src=0)
        content = torch.zeros(int(length), dtype=torch.int64)
        if self.world.is_main:
            content = torch.tensor(numbers, dtype=torch.int64)
        content = content.to(self._device)
        if content.numel():
            dist.broadcast(content, src=0)
        return [int(number) for number in content.tolist()]
