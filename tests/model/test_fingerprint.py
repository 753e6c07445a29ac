"""The hash of an encoder: the same for the same, another for anything that its features follow from."""

import copy
from collections.abc import Callable

import pytest
import torch

from mellow_ds.errors import ConfigError
from mellow_ds.model.configuration import MellowEncoderConfig
from mellow_ds.model.encoders import build_encoder
from mellow_ds.model.fingerprint import check_features, encoder_fingerprint
from mellow_ds.shard_format import FeatureInfo

SIZES = {"kind": "Cnn14", "clip_samples": 3200, "channels": (4, 8), "out_emb": 8, "num_classes": 5, "mel_bins": 16}


def config_with(**changes: object) -> MellowEncoderConfig:
    return MellowEncoderConfig(**{**SIZES, **changes})


@pytest.fixture
def encoder() -> torch.nn.Module:
    torch.manual_seed(3)
    return build_encoder(config_with()).eval()


def test_the_same_encoder_has_the_same_hash_in_any_mode_and_format(encoder: torch.nn.Module) -> None:
    first = encoder_fingerprint(encoder, config_with())
    assert encoder_fingerprint(copy.deepcopy(encoder).train(), config_with()) == first
    rounded = copy.deepcopy(encoder).bfloat16()
    again = copy.deepcopy(rounded).float()
    assert encoder_fingerprint(rounded, config_with()) == encoder_fingerprint(again, config_with())


@torch.no_grad()
def _one_weight(encoder: torch.nn.Module) -> None:
    next(encoder.parameters()).view(-1)[0] += 1e-6


@torch.no_grad()
def _one_statistic(encoder: torch.nn.Module) -> None:
    next(buffer for name, buffer in encoder.named_buffers() if name.endswith("running_mean"))[0] += 1e-6


@pytest.mark.parametrize("change", [_one_weight, _one_statistic])
def test_any_number_that_counts_changes_it(encoder: torch.nn.Module, change: Callable[..., None]) -> None:
    before = encoder_fingerprint(encoder, config_with())
    change(encoder)
    assert encoder_fingerprint(encoder, config_with()) != before


@pytest.mark.parametrize(
    "changes", [{"fmin": 20.0}, {"hop_size": 160}, {"clip_samples": 3201}, {"sampling_rate": 16000}]
)
def test_the_front_end_changes_it(encoder: torch.nn.Module, changes: dict[str, float]) -> None:
    assert encoder_fingerprint(encoder, config_with(**changes)) != encoder_fingerprint(encoder, config_with())


def test_what_features_do_not_follow_from_does_not(encoder: torch.nn.Module) -> None:
    before = encoder_fingerprint(encoder, config_with())
    assert encoder_fingerprint(encoder, config_with(audio_tokens=129, dropout=0.9)) == before
    next(buffer for name, buffer in encoder.named_buffers() if name.endswith("num_batches_tracked")).add_(1)
    assert encoder_fingerprint(encoder, config_with()) == before


def test_features_of_another_encoder_or_window_are_refused_by_name(encoder: torch.nn.Module) -> None:
    own = encoder_fingerprint(encoder, config_with())
    info = FeatureInfo(own, "Cnn14 of step-000006", 3200, (5, 8), (1, 5), 1)
    check_features(info, encoder, config_with())
    with pytest.raises(
        ConfigError, match=r"windows of 3200 samples.*data\.segment_seconds asks for 6400: set it to 0\.1"
    ):
        check_features(info, encoder, config_with(clip_samples=6400))
    _one_weight(encoder)
    with pytest.raises(
        ConfigError, match=f"features of Cnn14 of step-000006 with the hash {own}, but this run's encoder"
    ):
        check_features(info, encoder, config_with())
