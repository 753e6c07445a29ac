"""Several ranks of one test as real processes over gloo, with a hard deadline: those of `mellow-ds verify`."""

from mellow_ds.verify.processes import free_port, run_ranks

__all__ = ["free_port", "run_ranks"]
