"""Findings about room for checkpoints."""

from mellow_ds.doctor.facts import Case, ModelFacts
from mellow_ds.doctor.findings import SLOW, STOPS, Finding
from mellow_ds.doctor.memory import readable

_NUMBER = 4  # checkpoints hold float32
_MOMENTS = 2


def checkpoint_bytes(model: ModelFacts, optimizer_type: str) -> int:
    """Of one step folder: every weight once, and the moments of the trained ones; the rest is small."""
    matrices = sum(part.num_trained_matrices for part in model.parts) if optimizer_type == "Muon" else 0
    return _NUMBER * (model.num_parameters + _MOMENTS * model.num_trained - matrices)


def check_disk(case: Case) -> list[Finding]:
    """Bytes a checkpoint times those that are there while one more is written, against what is free."""
    if case.model is None or not case.machine.free_disk_bytes:
        return []
    train = case.config.train
    each = checkpoint_bytes(case.model, train.optimizer_type)
    kept = train.keep_checkpoints + bool(train.keep_best)
    needed, free = each * (kept + 1), case.machine.free_disk_bytes
    if needed <= free:
        return []
    fitting = free // each - 1 - bool(train.keep_best)
    what = (
        f"{kept} checkpoints of {readable(each)} are kept, and one more is there while it is written: "
        f"{readable(needed)}, but {case.config.save_dir} has {readable(free)} free"
    )
    if fitting < 1:
        return [
            Finding(
                STOPS, "disk-too-small", what, "a new checkpoint is whole before an old one is removed",
                "make room, or name a save_dir on another disk",
            )
        ]  # fmt: skip
    return [
        Finding(
            SLOW, "disk-small", what,
            "the disk will be full after a few saves; a failed save loses nothing, and ends the run",
            f"set train.keep_checkpoints to {fitting}, make room, or name a save_dir on another disk",
        )
    ]  # fmt: skip
