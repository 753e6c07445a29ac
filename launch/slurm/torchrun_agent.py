"""torchrun on one node of a SLURM job: `torchrun_agent.py NUM_PROCESSES SCRIPT ARGUMENT ...`, once a node, by srun.

Nodes, their order and the place where they meet are those of the SLURM step. What becomes of signals and exit codes is
that of `mellow_ds.launcher.torchrun`, but that SLURM may hand a signal to the ranks as well as to this agent
(MELLOW_SIGNALS_REACH=all): then the agent only waits.
"""

import os
import sys

from mellow_ds.errors import MellowError
from mellow_ds.launcher.torchrun import main as torchrun
from mellow_ds.world import World


def main(words: list[str]) -> int:
    """Start the processes of this node and wait for them; returns the exit code."""
    try:
        options = agent_options(int(words[0]))
    except MellowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    # torchrun would take 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // int(words[0]), 1)))
    return torchrun([*options, *words[1:]], os.environ.get("MELLOW_SIGNALS_REACH") == "all")


def agent_options(num_processes: int) -> list[str]:
    """torchrun's options, from the SLURM step that this agent is a task of."""
    world = World.from_env()  # of the agents, one a node
    address, port = world.rendezvous(os.environ)
    return [
        f"--nnodes={world.size}", f"--node-rank={world.rank}", f"--nproc-per-node={num_processes}",
        f"--master-addr={address}", f"--master-port={port}", "--max-restarts=0",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
