"""The benchmarks are scripts that import each other from their own folder; tests do the same. Minute networks."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def models():
    """Tokens a clip -> a tiny model of the project."""
    from project_side import TINY, build_project_models

    return build_project_models(TINY, seed=3)


@pytest.fixture
def original(models):
    """The original recipe with the weights of `models`."""
    from project_side import build_original

    return build_original(models[129])


@pytest.fixture
def waveforms():
    """Clips of three examples [6, S]."""
    from project_side import TINY, draw_waveforms

    return draw_waveforms(3, round(TINY.clip_seconds * 32_000), seed=5)
