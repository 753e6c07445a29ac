"""A run with adapters that starts from a step without any: the decoder's own weights, and new adapters."""

from pathlib import Path

import pytest
import torch

from mellow_ds.checkpoint.load import check_adapters, load_model_weights
from mellow_ds.checkpoint.peers import Peers
from mellow_ds.checkpoint.store import CheckpointStore
from mellow_ds.errors import CheckpointError
from mellow_ds.model.lora import draw_adapters
from mellow_ds.model.modeling import MellowForConditionalGeneration
from mellow_ds.verify.small import batch_of, small_model
from mellow_ds.world import World
from tests.checkpoint.saving import save_step
from tests.engine.cases import make_engine
from tests.ranks import run_ranks


def with_adapters(rank: int = 2) -> MellowForConditionalGeneration:
    config = small_model(seed=7).config
    config.lora = {"rank": rank, "alpha": 4.0, "dropout": 0.0, "target_modules": ["all-linear"]}
    torch.manual_seed(7)
    model = MellowForConditionalGeneration(config)
    draw_adapters(model.decoder, 3)
    model.set_trainable(("decoder",))
    return model.eval()


def save(model: MellowForConditionalGeneration, folder: Path, world: World) -> Path:
    engine = make_engine("fsdp", model, 0, world)
    return save_step(CheckpointStore(folder, 1, Peers(world, engine.device)), 1, engine, {})


def check(world: World, folder: Path) -> None:
    plain = small_model(seed=1).eval()
    step = save(plain, folder / "plain", world)
    model = with_adapters()
    load_model_weights(model, step)
    inputs = batch_of([1, 2, 3], plain.num_audio_tokens).model_inputs()
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss)  # new adapters give nothing yet
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    trained = save(model, folder / "adapted", world)
    again = with_adapters()
    load_model_weights(again, trained)
    assert torch.equal(again.eval()(**inputs).loss, model.eval()(**inputs).loss)
    assert not torch.allclose(again(**inputs).loss, plain(**inputs).loss)
    with pytest.raises(CheckpointError, match="of another model"):
        load_model_weights(small_model(seed=1), trained)
    with pytest.raises(CheckpointError, match="of another model shape"):
        load_model_weights(with_adapters(rank=3), trained)


def test_adapters_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    adapted, plain = tmp_path / "adapted", tmp_path / "plain"
    with_adapters().config.save_pretrained(adapted)
    small_model(seed=1).config.save_pretrained(plain)
    for goes_on in (True, False):
        check_adapters(with_adapters(), adapted, goes_on)
        check_adapters(small_model(seed=1), plain, goes_on)
        with pytest.raises(CheckpointError, match="alpha 4, on all-linear, but the run configures none"):
            check_adapters(small_model(seed=1), adapted, goes_on)
        other = with_adapters()
        other.config.lora["alpha"] = 8.0
        with pytest.raises(CheckpointError, match=r"rank 2, alpha 8, .*: set model.decoder.lora as"):
            check_adapters(other, adapted, goes_on)
    check_adapters(with_adapters(), plain, goes_on=False)
    with pytest.raises(CheckpointError, match=r"no adapters, but .* rank 2, .* in another save_dir"):
        check_adapters(with_adapters(), plain, goes_on=True)
    other = with_adapters()
    other.config.lora["dropout"] = 0.5  # belongs to the training, not to what was trained
    check_adapters(other, adapted, goes_on=True)
    check_adapters(other, tmp_path, goes_on=True)  # no configuration: what is missing there is said elsewhere


def test_a_step_without_adapters_starts_a_run_with_some(tmp_path: Path) -> None:
    run_ranks(1, check, tmp_path)
