"""Train, or evaluate a checkpoint: a shim over `mellow_ds.cli.train`.

It is here so that `deepspeed --hostfile hosts train.py ...`, `torchrun train.py ...` and `srun python train.py ...`
work from a clone that is not installed: Python puts the folder of the script it runs first on its path.
"""

import sys

try:
    from mellow_ds.cli.train import main
except ModuleNotFoundError as missing:
    name = missing.name or ""
    if name.partition(".")[0] == "mellow_ds":
        raise
    print(
        f"error: {sys.executable} has no {name}: source .venv/bin/activate first (bash launch/setup_env.sh makes it)",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":  # worker processes of the data loader may import this file again
    sys.exit(main())
