"""Settings of a build: bounds are held on construction."""

from typing import Any

import pytest

from mellow_ds.errors import PackingError
from mellow_ds.packing.settings import BuildSettings, available_cpus


@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": "mp3"},
        {"sample_rate": 0},
        {"sample_rate": 1_000_000},
        {"shard_megabytes": 0},
        {"shard_megabytes": float("nan")},
        {"max_rejected": -0.1},
        {"max_rejected": 1.5},
        {"max_rejected": float("nan")},
        {"workers": -1},
    ],
)
def test_a_wrong_value_is_refused_by_its_option(wrong: dict[str, Any]) -> None:
    option = "--" + next(iter(wrong)).replace("_", "-")
    with pytest.raises(PackingError, match=option):
        BuildSettings(**wrong)


def test_no_number_of_workers_means_one_a_cpu() -> None:
    assert BuildSettings().num_workers == available_cpus() >= 1
    assert BuildSettings(workers=3).num_workers == 3
