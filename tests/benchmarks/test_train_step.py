"""The benchmark of train steps at minute sizes: what it runs, what it writes, how it compares. Not how fast it is."""

import json
import math

import pytest
import train_step
import workload
from project_side import TINY, recipe_config


def changed(before, module):
    """Names of parameters that differ from the copies in `before`."""
    return {name for name, parameter in module.named_parameters() if not before[name].equal(parameter)}


def copies(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_it_writes_every_round_of_all_variants(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--tiny", "--rounds", "2", "--batch-size", "2", "--layers", "1", "--threads", "1", "--out", str(out)]
    train_step.main(arguments)
    result = json.loads(out.read_text())
    names = ["original recipe", "33 tokens a clip", "129 tokens a clip"]
    assert list(result["seconds"]) == names
    for name in names:
        assert len(result["seconds"][name]) == len(result["losses"][name]) == 2
        assert all(seconds > 0 for seconds in result["seconds"][name])
        # untrained: near the loss of guessing
        assert all(abs(loss - math.log(TINY.vocab_size)) < 1.5 for loss in result["losses"][name])
    assert result["sizes"]["num_hidden_layers"] == 1
    assert result["workload"]["examples"] == 4
    assert result["command"] == "python benchmarks/train_step.py " + " ".join(arguments)
    table = capsys.readouterr().out
    assert all(name in table for name in names)


def test_ratios_are_of_the_same_round():
    compared = train_step.compare({"original recipe": [8.0, 9.0, 20.0], "x": [2.0, 3.0, 4.0]})
    assert compared["times_as_fast_rounds"] == {"x": [4.0, 3.0, 5.0]}
    assert compared["times_as_fast_median"] == {"x": 4.0}
    assert compared["times_as_fast_total"] == {"x": pytest.approx(37 / 9)}
    assert compared["median_seconds"] == {"original recipe": 9.0, "x": 3.0}


def test_a_step_of_the_original_trains_all_but_the_frozen_encoder(original, waveforms):
    step = train_step.original_step(original, recipe_config(TINY).train)
    before = copies(original)
    step(workload.draw_examples(3, 0, TINY.vocab_size), waveforms)()
    trained = changed(before, original)
    assert {name for name in before if not name.startswith(("encoder.trunk.", "encoder.tscam_conv."))} == trained


def test_a_step_of_the_project_trains_decoder_and_its_projector(models, waveforms):
    steps = train_step.project_steps(models, recipe_config(TINY).train)
    before = {tokens: copies(model) for tokens, model in models.items()}
    losses = [steps["33 tokens a clip"](workload.draw_examples(3, 0, TINY.vocab_size), waveforms)() for _ in range(8)]
    parts = {tokens: {n.split(".")[0] for n in changed(before[tokens], models[tokens])} for tokens in models}
    assert parts == {33: {"projector", "decoder"}, 129: {"decoder"}}  # the decoder is one, the projectors are two
    assert losses[-1] < losses[0] - 0.1


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_step.parse_arguments(["--rounds", "0"])
    assert "less than 1" in capsys.readouterr().err
