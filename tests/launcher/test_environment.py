"""What travels, what stays, and what is secret by its name."""

import pytest

from mellow_ds.errors import ConfigError
from mellow_ds.launcher.environment import choose_variables, is_secret

HERE = {"NCCL_DEBUG": "INFO", "HF_HOME": "/cache", "HF_TOKEN": "x1", "MELLOW_API_KEY": "x2", "PATH": "/bin",
        "MINE": "3", "TOKENIZERS_PARALLELISM": "false", "DISPLAY": ":0"}  # fmt: skip


def test_what_is_on_the_list_travels_and_secrets_do_not() -> None:
    travelling = choose_variables(HERE)
    assert travelling.allowed == {"NCCL_DEBUG": "INFO", "HF_HOME": "/cache", "TOKENIZERS_PARALLELISM": "false"}
    assert travelling.named == {}
    assert travelling.withheld == ("HF_TOKEN", "MELLOW_API_KEY")


def test_what_is_named_travels_and_a_secret_is_not_shown() -> None:
    travelling = choose_variables(HERE, ["MINE", "HF_TOKEN", "NCCL_DEBUG=WARN", "NEW=a=b"])
    assert travelling.named == {"MINE": "3", "HF_TOKEN": "x1", "NCCL_DEBUG": "WARN", "NEW": "a=b"}
    assert "NCCL_DEBUG" not in travelling.allowed
    assert travelling.withheld == ("MELLOW_API_KEY",)
    assert "HF_TOKEN=(not shown)" in travelling.shown()
    assert "NCCL_DEBUG=WARN" in travelling.shown()
    assert "x1" not in " ".join(travelling.shown())


@pytest.mark.parametrize(
    ("named", "message"),
    [("NOT_SET", "it is not set here"), ("RANK=3", "gets its own RANK"), ("a-b=1", "not the name of a variable")],
)
def test_what_cannot_be_named_is_refused(named: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_variables(HERE, [named])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("HF_TOKEN", True), ("WANDB_API_KEY", True), ("DB_PASSWORD", True), ("AWS_SECRET_ACCESS_KEY", True),
     ("ssh_keys", True), ("TOKENIZERS_PARALLELISM", False), ("NCCL_IB_HCA", False), ("MELLOW_KEYBOARD", False)],
)  # fmt: skip
def test_secret_by_name(name: str, expected: bool) -> None:
    assert is_secret(name) is expected
