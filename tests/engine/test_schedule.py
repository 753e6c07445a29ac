"""Learning rates against torch's own schedulers, and clipping against its running mean."""

import math

import pytest
import torch

from mellow_ds.config.train_keys import TrainConfig
from mellow_ds.engine.schedule import ClipThreshold, Schedule
from mellow_ds.errors import ConfigError

PEAK, FLOOR, TOTAL = 0.8, 0.1, 24


def rates(config: TrainConfig, total: int = TOTAL) -> list[float]:
    schedule = Schedule(config, total)
    return [schedule.learning_rate(step) for step in range(total)]


def torch_rates(make, total: int = TOTAL) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


LR = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({"scheduler": "constant"}, lambda o: LR.ConstantLR(o, 1.0)),
        ({"scheduler": "linear"}, lambda o: LR.LinearLR(o, 1.0, FLOOR / PEAK, total_iters=TOTAL)),
        ({"scheduler": "cosine"}, lambda o: LR.CosineAnnealingLR(o, TOTAL, eta_min=FLOOR)),
        (
            {"scheduler": "cosine_restarts", "restart_steps": 7},
            lambda o: LR.CosineAnnealingWarmRestarts(o, 7, eta_min=FLOOR),
        ),
        ({"scheduler": "step", "decay_steps": 5, "decay_factor": 0.3}, lambda o: LR.StepLR(o, 5, gamma=0.3)),
    ],
)
def test_schedules_are_those_of_torch(fields: dict, make) -> None:
    config = TrainConfig(learning_rate=PEAK, min_learning_rate=FLOOR, **fields)
    assert rates(config) == pytest.approx(torch_rates(make))


def test_warm_up_rises_in_equal_steps_and_the_schedule_follows() -> None:
    config = TrainConfig(learning_rate=PEAK, scheduler="linear", warmup_steps=4)
    found = rates(config, 8)
    assert found == pytest.approx([PEAK * x for x in (0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25)])
    with pytest.raises(ConfigError, match=r"train\.warmup_steps is 4, but the run has only 3 steps"):
        Schedule(config, 3)


def test_loss_tracking_decays_after_steps_without_a_better_loss_and_resumes() -> None:
    config = TrainConfig(learning_rate=1.0, scheduler="loss_tracking", decay_steps=3, decay_factor=0.5)
    schedule = Schedule(config, 100)
    for loss in (4.0, 3.0, 2.0):
        schedule.observe(loss)
    assert schedule.learning_rate(3) == 1.0
    for step in range(3, 60):
        schedule.observe(9.0)
        if schedule.learning_rate(step) < 1.0:
            break
    assert (step, schedule.learning_rate(step)) == (5, 0.5)  # the smoothed loss rises from step 3 on
    schedule.observe(math.nan)  # a skipped step says nothing
    again = Schedule(config, 100)
    again.load_state(schedule.state())
    assert again.learning_rate(6) == 0.5
    for _ in range(3):
        schedule.observe(9.0)
        again.observe(9.0)
    assert again.learning_rate(9) == schedule.learning_rate(9) == 0.25


def test_clip_threshold_is_the_smaller_of_norm_and_multiple_of_the_running_mean() -> None:
    clip = ClipThreshold(TrainConfig(max_grad_norm=5.0, clip_to_running_mean=2.0))
    assert clip.threshold() == 5.0
    clip.observe(1.0)
    assert clip.threshold() == pytest.approx(2.0)  # the bias of a young running mean is corrected
    for _ in range(2000):
        clip.observe(4.0)
    assert clip.threshold() == pytest.approx(5.0)
    clip.observe(math.inf)
    again = ClipThreshold(TrainConfig(max_grad_norm=0.0, clip_to_running_mean=2.0))
    assert again.threshold() == 0.0
    again.load_state(clip.state())
    assert again.threshold() == pytest.approx(8.0, rel=1e-4)
