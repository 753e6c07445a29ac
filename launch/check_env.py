"""What each rank sees, side by side: rank variables and who set them, host, device, versions, interfaces.

    mellow-ds launch --hostfile hosts -- launch/check_env.py
    torchrun --nproc-per-node 2 launch/check_env.py
    srun python launch/check_env.py
    deepspeed --num_gpus 2 launch/check_env.py
    python launch/check_env.py

Put in the place of train.py, behind whatever starts that. (Whether an interpreter has what setup.py requires says
launch/has_requirements.py.)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mellow_ds.preflight.rank_view import main, parse_arguments

__all__ = ["main", "parse_arguments"]

if __name__ == "__main__":
    sys.exit(main())
