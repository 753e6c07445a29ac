"""Command lines of tiny runs, and the environment that they start in."""

import os
from pathlib import Path

from tests.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = [
    "--data.segment_seconds", "0.5", "--model.encoder.channels", "4", "8", "--model.encoder.out_emb", "8",
    "--model.encoder.d_proj", "16", "--model.decoder.hidden_size", "16", "--model.decoder.intermediate_size", "24",
    "--model.decoder.num_hidden_layers", "1", "--model.decoder.num_attention_heads", "2", "--train.num_workers", "0",
    "--train.batch_size", "2", "--train.global_batch_size", "4", "--train.warmup_steps", "2",
    "--train.log_every_steps", "1", "--evaluation.max_new_tokens", "4",
    "--train.save_every_steps", "3", "--train.max_steps", "6",
]  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without a launcher's variables."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    base = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**base, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def two_ranks_by_torchrun(*arguments: object) -> list[str]:
    """The same by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return [*launcher, "train.py", *map(str, arguments)]


def two_ranks(*arguments: object) -> list[str]:
    """The command line of train.py on two ranks of this host, by DeepSpeed's own launcher."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    return [*launcher, "train.py", *map(str, arguments)]
