"""DeepSpeed's own ops in tests: where they were compiled before, or where somebody asks for it."""

import os
import subprocess
import sys

import pytest
from deepspeed.ops.op_builder.all_ops import ALL_OPS

from mellow_ds.engine.extension_lock import check_extension_locks
from mellow_ds.engine.ops import is_compiled, op_problem


def need(*names: str) -> None:
    """Skip the test where one of these ops is not compiled in this environment; with MELLOW_TEST_COMPILE compile it."""
    for name in names:
        if problem := op_problem(name, ALL_OPS, has_gpu=False):
            pytest.skip(problem)
    missing = [name for name in names if not is_compiled(name)]
    if not missing:
        return
    if not os.environ.get("MELLOW_TEST_COMPILE"):
        pytest.skip(f"{' and '.join(missing)} not compiled here: MELLOW_TEST_COMPILE=1 does it, in minutes")
    check_extension_locks()
    code = f"from deepspeed.ops.op_builder.all_ops import ALL_OPS as ops; [ops[name].load() for name in {missing}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
