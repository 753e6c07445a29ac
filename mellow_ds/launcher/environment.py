"""Which of the launcher's variables travel to the ranks: an allow-list, and what is named; secrets only if named."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mellow_ds.errors import ConfigError

# what libraries of a run read; PATH and library paths belong to the host (or to --env-file)
_BEGINNINGS = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "PYTORCH_", "TRITON_", "DS_",
    "MELLOW_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "CUDA_LAUNCH_", "CUDA_DEVICE_",
)  # fmt: skip
_WHOLE = ("TZ", "LANG", "LC_ALL", "XDG_CACHE_HOME", "NO_COLOR")
_SECRET = re.compile(r"(?:TOKEN|SECRET|KEY|PASSWORD|PASSWD|CREDENTIAL)S?(?:_|$)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# what each rank gets from the plan
PLACE_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MELLOW_LAUNCH_ID",
)  # fmt: skip


@dataclass(frozen=True)
class Travelling:
    """The variables that go to every host."""

    allowed: dict[str, str]  # by the allow-list; an environment file of the host comes before them
    named: dict[str, str]  # by --env; they come before all others
    withheld: tuple[str, ...] = ()  # on the allow-list, but secret by their names

    def shown(self) -> list[str]:
        """`NAME=value` of each, sorted, without the values of secrets."""
        both = {**self.allowed, **self.named}
        return [f"{name}={'(not shown)' if is_secret(name) else both[name]}" for name in sorted(both)]


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is nobody's business: HF_TOKEN is, TOKENIZERS_PARALLELISM not."""
    return _SECRET.search(name.upper()) is not None


def choose_variables(environ: Mapping[str, str], named: Iterable[str] = ()) -> Travelling:
    """What travels of `environ`; `named`: `NAME`, with the value that it has here, or `NAME=value`."""
    given = dict(_read_named(word, environ) for word in named)
    listed = sorted(
        name for name in environ if (name.startswith(_BEGINNINGS) or name in _WHOLE) and name not in PLACE_VARIABLES
    )
    return Travelling(
        allowed={name: environ[name] for name in listed if not is_secret(name) and name not in given},
        named=given,
        withheld=tuple(name for name in listed if is_secret(name) and name not in given),
    )


def _read_named(word: str, environ: Mapping[str, str]) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--env {word}: '{name}' is not the name of a variable")
    if name in PLACE_VARIABLES:
        raise ConfigError(f"--env {name}: each rank gets its own {name} from the launcher; leave it out")
    if not equals and name not in environ:
        raise ConfigError(f"--env {name}: it is not set here; set it, or give --env {name}=VALUE")
    return name, value if equals else environ[name]
