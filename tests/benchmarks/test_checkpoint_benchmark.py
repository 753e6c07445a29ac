"""What the checkpoint benchmark makes of its rounds, and the run that it goes on from. Not how fast anything is."""

import checkpoint
import pytest


def a_round(waited: float, blocked: float, plain: list[float], beside: list[float], left: float) -> dict:
    return {
        "synchronous_save": waited,
        "asynchronous_save": blocked,
        "steps": plain,
        "steps_beside_it": beside,
        "left_after_them": left,
    }


def test_ratios_are_of_the_same_round_and_faster_steps_give_nothing_back():
    found = checkpoint.summarise(
        [
            a_round(10.0, 1.0, [2.0, 2.0], [3.0, 2.0], 0.5),
            a_round(8.0, 2.0, [2.0, 2.0], [1.0, 1.0], 0.0),
            a_round(20.0, 3.0, [2.0, 2.0], [4.0, 2.0], 0.0),
        ]
    )
    assert found["median_synchronous"] == 10.0
    assert found["median_asynchronous"] == 2.0
    assert found["median_slowed"] == 1.0
    assert found["share"] == pytest.approx(0.15)  # of 0.1, 0.25 and 0.15
    assert found["share_with_slowed_steps"] == 0.25  # of 0.25, 0.25 and 0.25


def test_the_resumed_run_is_the_recipe_on_a_decoder_of_its_own(tmp_path):
    arguments = checkpoint.run_arguments(checkpoint.parse_arguments(["--tiny"]), tmp_path)
    assert arguments[:2] == ["--config", "mellow"]
    assert (tmp_path / "decoder" / "model.safetensors").is_file()
    assert (tmp_path / "decoder" / "tokenizer_config.json").is_file()
    assert (tmp_path / "shards" / "manifest.json").is_file()
    assert arguments[arguments.index("--model.encoder.d_proj") + 1] == "48"
