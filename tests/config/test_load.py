"""Recipes, YAML files, overrides, Mellow's keys: what is read, what is refused, and in which words."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mellow_ds.config.load import config_help, dump_run_config, known_keys, load_run_config, recipe_names
from mellow_ds.config.schema import MixtureSet, RunConfig
from mellow_ds.errors import ConfigError

MELLOW_YAML = """
mode: 'train'
gpu: True
resume_checkpoint: ""
data:
    datapath: '/audio'
    datafiles:
        - 'a.json'
        - 'b.json'
    sampling_rate: 32000
    segment_seconds: 10
    tokenizer_type: "HuggingFaceTB/SmolLM2-135M"
    op_text_len: 250
    ip_text_len: 129
model:
    encoder:
        audioenc_name: 'HTSAT'
        transformer_embed_dim: 768
        out_emb: 768
        d_proj: 576
        use_pretrained_audioencoder: True
        freeze_audio_encoder_weights: True
        pretrained_audioencoder_path: '/weights'
    decoder:
        text_decoder: "HuggingFaceTB/SmolLM2-135M"
        prefix_length: 40
        total_prefix_length: 389
        freeze_gpt_weights: False
    model_type: Mellow
    resume_checkpoint: ""
train:
    optimizer:
        optimizer_type: Adam
        learning_rate: 1e-3
        warm_up_steps: 10000
        weight_decay: 0.0001
        scheduler: "cosine"
    max_grad_norm: 0.5
    num_workers: 4
    sync_batchnorm: True
    batch_size: 4
    num_epochs: 10
    log_step: 1
    random_seed: 1234
    mixed_precision:
        use_mixed_precision: False
        mixed_precision_dtype: "float16"
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_run_config(name)
    assert load_run_config(write(tmp_path, dump_run_config(config))) == config


def test_the_recipes_that_the_readme_names_are_there() -> None:
    assert {"quickstart", "digits", "mellow", "mellow-gpt2"} <= set(recipe_names())


def test_help_says_of_every_key_what_it_is_and_means() -> None:
    lines = config_help().splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("   ")] == [f"--{key}" for key in known_keys()]
    at = lines.index("  --data.sampling_rate 32000")
    assert lines[at + 1].strip() == "Hz; the shards must have been packed at this rate."
    assert {'  --deepspeed_config ""', "  --data.shuffle true", "  --engine auto"} <= set(lines)


def test_a_yaml_of_mellow_is_read_and_its_idle_keys_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mellow_ds"), "propagate", True)
    with caplog.at_level(logging.WARNING, "mellow_ds"):
        config = load_run_config(write(tmp_path, MELLOW_YAML))
    assert config.data.datafiles == ("a.json", "b.json")
    assert config.train.learning_rate == 1e-3  # YAML 1.1 alone would read text
    assert (config.train.optimizer_type, config.train.scheduler, config.train.weight_decay) == ("Adam", "cosine", 1e-4)
    assert (config.train.seed, config.train.log_every_steps, config.train.max_grad_norm) == (1234, 1, 0.5)
    assert config.train.mixed_precision.use_mixed_precision == "false"
    assert config.model.encoder.pretrained_audioencoder_path == "/weights"
    (message,) = {record.getMessage() for record in caplog.records}
    assert "model.decoder.prefix_length" in message
    assert "train.optimizer.warm_up_steps (train.warmup_steps)" in message
    assert "train.optimizer.learning_rate" not in message


def test_overrides_win_and_mellow_names_work_there_too() -> None:
    config = load_run_config(
        "digits", {"train.batch_size": "8", "train.optimizer.learning_rate": "5e-4", "data.shards": "[a, b]"}
    )
    assert (config.train.batch_size, config.train.learning_rate, config.data.shards) == (8, 5e-4, ("a", "b"))
    assert load_run_config("digits", {"data.shards": "one"}).data.shards == ("one",)


@pytest.mark.parametrize(
    ("overrides", "keeps"),
    [
        ({}, True),
        ({"model.encoder.freeze_audio_encoder_weights": "false"}, False),
        (
            {"model.encoder.use_pretrained_audioencoder": "true", "model.encoder.pretrained_audioencoder_path": "w"},
            False,
        ),
        ({"model.encoder.audioenc_name": "someone/wav2vec2"}, False),
        ({"resume_checkpoint": "w"}, False),
        ({"train.phases": "[{from_step: 0, train: [projector]}]"}, True),
        ({"train.phases": "[{from_step: 0, train: [projector]}, {from_step: 9, train: [encoder]}]"}, False),
    ],
)
def test_an_encoder_that_stays_random_is_known(overrides: dict[str, str], keeps: bool) -> None:
    assert load_run_config("mellow", overrides).keeps_random_encoder is keeps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.batchsize": "8"}, r"unknown key train\.batchsize; did you mean train\.batch_size\?"),
        ({"train.batch_size": "eight"}, r"train\.batch_size is 'eight' \(str\); it takes a whole number"),
        ({"train.batch_size": "0"}, r"train\.batch_size is 0; it must be at least 1"),
        ({"train.batch_size": "true"}, r"train\.batch_size is True"),
        ({"train.scheduler": "exponential"}, r"train\.scheduler is 'exponential'; choose one of constant, linear"),
        ({"train.warmup_steps": "50", "train.max_steps": "50"}, r"train\.warmup_steps is 50, but the run has only 50"),
        ({"train.gradient_accumulation_steps": "2"}, r"train\.global_batch_size and .* are both given"),
        ({"model.encoder.d_proj": "64"}, r"model\.encoder\.d_proj is 64 but model\.decoder\.hidden_size is 128"),
        ({"model.encoder.freeze_audio_encoder_weights": "true"}, r"has no weights: set it to false"),
        ({"model.encoder.use_pretrained_audioencoder": "true"}, r"pretrained_audioencoder_path is empty"),
        ({"model.encoder.fmax": "10"}, r"model\.encoder\.fmax is 10\.0; it must be above fmin"),
        ({"mode": "evaluate"}, r"mode is 'evaluate'; choose one of train, evaluate_checkpoint"),
        ({"train.keep_best": "eval_loss"}, r"train\.evaluate_every_steps is 0: nothing measures it"),
        (
            {"train.keep_best": "eval_loss", "train.evaluate_every_steps": "7", "train.save_every_steps": "10"},
            r"train\.save_every_steps \(10\) is no multiple of train\.evaluate_every_steps \(7\)",
        ),
        ({"train.betas": "[0.9]"}, r"train\.betas holds 1 values; it takes 2"),
        ({"train.mixed_precision.mixed_precision_dtype": "int8"}, r"choose one of bfloat16, float16"),
    ],
)
def test_what_is_wrong_is_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config("digits", overrides)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'quikstart' is neither a file nor a recipe: did you mean 'quickstart'\?"):
        load_run_config("quikstart")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", r"run\.yaml line \d is not valid YAML"), ("- 1", "holds a list, not a mapping"), ("train: 3", "train")],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(write(tmp_path, text))


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_run_config(write(tmp_path, "")) == RunConfig()


def test_loading_does_not_import_torch() -> None:
    code = "from mellow_ds.config.load import load_run_config; load_run_config('mellow')"
    code += "; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mixture_is_a_list_of_mappings(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  mixture:\n    - {shards: a/x, weight: 3}\n    - {shards: [b, c], name: rest, weight: 1}\n"
    )
    mixture = load_run_config(str(file)).data.mixture
    assert mixture == (MixtureSet(("a/x",), weight=3.0), MixtureSet(("b", "c"), "rest", 1.0))
    assert [part.label for part in mixture] == ["x", "rest"]
    assert load_run_config(str(file)).data.train_shards == ("a/x", "b", "c")
    again = tmp_path / "again.yaml"
    again.write_text(dump_run_config(load_run_config(str(file))))
    assert load_run_config(str(again)).data.mixture == mixture
    overridden = load_run_config("quickstart", {"data.mixture": "[{shards: a, epochs: 2}]"})
    assert overridden.data.mixture == (MixtureSet(("a",), epochs=2.0),)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[{shards: a}]", "the set a has weight 0.0 and epochs 0.0; give one"),
        ("[{shards: a, weight: 1, epochs: 1}]", "give one"),
        ("[{shards: a, weight: 1}, {shards: b, epochs: 1}]", "a weight for some sets and epochs for others"),
        ("[{shards: a, wieght: 1}]", "unknown key wieght in data.mixture; did you mean weight?"),
        ("[{weight: 1}]", "a set without shards"),
        ("[a, b]", "data.mixture holds 'a'; each entry is a mapping of shards, name, weight, epochs"),
        ("[{shards: x/a, weight: 1}, {shards: y/a, weight: 1}]", "two sets called a"),
        ("[{shards: a, weight: much}]", "data.mixture.weight is 'much'"),
        ("[{shards: a, weight: -1}]", "at least 0"),
    ],
)
def test_wrong_mixtures_are_refused(mixture: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config("quickstart", {"data.mixture": mixture})


def test_shards_and_mixture_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="data.shards and data.mixture are both given"):  # noqa: RUF043
        load_run_config("quickstart", {"data.shards": "s", "data.mixture": "[{shards: a, weight: 1}]"})


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("data.segment_seconds", ".nan"),
        ("train.learning_rate", ".inf"),
        ("data.mixture", "[{shards: a, weight: .inf}]"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}\S* is (nan|inf); it takes a finite number"):
        load_run_config("quickstart", {key: text})
