"""What FSDP2 gathers at a time: each block of the decoder, the projector, and the stages of a trained encoder."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from mellow_ds.engine.sharded import ShardedModel, whole_tensor
from mellow_ds.verify.small import small_model
from mellow_ds.world import World
from tests.ranks import run_ranks

BLOCKS = {"", "projector", "decoder.model.layers.0", "decoder.model.layers.1"}
STAGES = {"encoder.net.conv_block1", "encoder.net.conv_block2"}


def check(world: World) -> None:
    cpu = torch.device("cpu")
    for parts, megabytes, expected in (
        (("projector", "decoder"), 512.0, BLOCKS),  # the frozen encoder stays whole
        (("projector", "decoder"), 0.0, BLOCKS | STAGES),
        (("encoder", "projector", "decoder"), 512.0, BLOCKS | STAGES),
        (("projector",), 512.0, {"", "projector"}),  # and so does a frozen decoder
    ):
        model = small_model(seed=1)
        model.set_trainable(parts)
        ShardedModel(model, 3, "float32", cpu, world.size, False, megabytes)
        assert {name for name, module in model.named_modules() if isinstance(module, FSDPModule)} == expected
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) or not parameter.requires_grad, name


def test_blocks_stages_and_the_projector_are_gathered_one_by_one() -> None:
    run_ranks(1, check)


def check_offloaded(world: World, meeting: Path) -> None:
    """A group whose ranks exchange nothing that is in CPU memory, as those of GPUs do not."""
    dist.destroy_process_group()
    # by a file: the port of the first group may still be answered by what is just being closed
    store = dist.FileStore(str(meeting), world.size)
    dist.init_process_group("cuda:gloo", store=store, rank=world.rank, world_size=world.size)
    mesh = init_device_mesh("cpu", (world.size,))
    part = torch.full((3 - world.rank, 4), float(world.rank))  # 5 rows
    offloaded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size([5, 4]), stride=(4, 1))
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        offloaded.full_tensor()
    elsewhere = whole_tensor(offloaded, torch.device("meta"))
    assert (elsewhere.device.type, tuple(elsewhere.shape)) == ("meta", (5, 4))


def test_what_is_offloaded_is_gathered_on_the_device(tmp_path: Path) -> None:
    run_ranks(2, check_offloaded, tmp_path / "meeting")
