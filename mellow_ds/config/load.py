"""From a recipe name or YAML file and command-line overrides to a checked `RunConfig`, without importing torch."""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import logging
import math
import re
import textwrap
import types
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mellow_ds.config.mellow_keys import NEVER_READ, RENAMED
from mellow_ds.config.schema import RunConfig
from mellow_ds.errors import ConfigError
from mellow_ds.log import ALIKE

RECIPES = Path(__file__).parent.parent / "recipes"
_INDENT = " " * 8
_log = logging.getLogger("mellow_ds.config")


def load_run_config(name_or_path: str, overrides: dict[str, str] | None = None) -> RunConfig:
    """The configuration in a YAML file or recipe, with dotted `overrides` (text, as typed) laid over it.

    Raises `ConfigError` naming the key, what was found and the nearest known key.
    """
    path = find_recipe(name_or_path)
    values = _flatten(_read_yaml(path))
    values = _translate_mellow(values, str(path))
    for key, text in (overrides or {}).items():
        values[RENAMED.get(key, key)] = _parse_text(key, text)
    values = {key: value for key, value in values.items() if key not in NEVER_READ}
    return _build(RunConfig, values, "")


def find_recipe(name_or_path: str) -> Path:
    """The YAML file that `--config` means: a path, or the name of a shipped recipe."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    names = recipe_names()
    near = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(f"--config '{name_or_path}' is neither a file nor a recipe: {hint}recipes are {', '.join(names)}")


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def dump_run_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_run_config` reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def known_keys() -> list[str]:
    """Every dotted key of a run configuration, in order."""
    return [key for key, _ in _fields(RunConfig, "")]


def config_help() -> str:
    """Each key with its default and, below it, what it means, for `--help`."""
    defaults = _flatten(_plain(dataclasses.asdict(RunConfig())))
    lines: list[str] = []
    for key, section in _fields(RunConfig, ""):
        meaning = _field_docstrings(section)[key.rpartition(".")[2]]
        lines += [
            f"  --{key} {_as_typed(defaults[key])}",
            *textwrap.wrap(meaning, 110, initial_indent=_INDENT, subsequent_indent=_INDENT),
        ]
    return "\n".join(lines)


def _as_typed(value: Any) -> str:
    """A default as it would be typed: text without quotes, unless it is empty."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a mapping of keys to values")
    return content


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number: YAML 1.1 wants 1.0e-3 and takes Mellow's `1e-3` for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flatten(value, dotted + "."))
        else:
            flat[dotted] = value
    return flat


def _translate_mellow(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Put Mellow's keys where they stand here; name once the ones that never had an effect."""
    ignored = [key for key in values if key in NEVER_READ]
    if ignored:
        notes = [f"{key} ({NEVER_READ[key]})" if NEVER_READ[key] else key for key in ignored]
        _log.warning("%s: keys without effect, as in Mellow: %s", source, "; ".join(notes), extra=ALIKE)
    translated: dict[str, Any] = {}
    for key, value in values.items():
        if key in RENAMED and value in ("", None):
            continue  # Mellow's files hold an empty model.resume_checkpoint beside the one that counts
        translated[RENAMED.get(key, key)] = value
    return translated


def _parse_text(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--{key} {text}: not a value that YAML can read; quote it") from None


def _fields(cls: type, prefix: str) -> list[tuple[str, type]]:
    """(dotted key, the dataclass that has it) of every leaf field."""
    hints = typing.get_type_hints(cls)
    leaves: list[tuple[str, type]] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            leaves.extend(_fields(typing.cast(type, hint), f"{prefix}{field.name}."))
        else:
            leaves.append((prefix + field.name, cls))
    return leaves


@functools.cache
def _field_docstrings(cls: type) -> dict[str, str]:
    """Python keeps no docstrings of fields: they are read where they stand, below each."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for line, below in pairwise(definition.body):
        match line, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `cls` from the dotted `values` that begin with `prefix`."""
    if not prefix:
        known = known_keys()
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"unknown key {key}{hint}")
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _build(typing.cast(type, hint), values, key + ".")
        elif key in values:
            arguments[field.name] = _coerce(key, values[key], hint)
    return cls(**arguments)


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names; text stands for a list of one."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _coerce_mapping(key, value, typing.cast(type, hint))
    if origin is tuple:
        inner = typing.get_args(hint)
        items = value if isinstance(value, list | tuple) else [] if value in (None, "") else [value]
        if inner[-1] is not Ellipsis and len(items) != len(inner):
            raise ConfigError(f"{key} holds {len(items)} values; it takes {len(inner)}")
        return tuple(_coerce(key, item, inner[0]) for item in items)
    if origin is typing.Literal:
        text = str(value).lower() if isinstance(value, bool) else value
        if text not in typing.get_args(hint):
            raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(map(str, typing.get_args(hint)))}")
        return text
    assert not isinstance(hint, types.UnionType), f"{key}: unions are not used in the schema"
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; it takes a finite number")
    if hint is str and value is None:
        return ""
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise ConfigError(f"{key} is {value!r} ({type(value).__name__}); it takes {_type_name(hint)}")
    return value


def _coerce_mapping(key: str, value: Any, cls: type) -> Any:
    """An instance of the dataclass `cls` from an entry of a list, a mapping of its fields."""
    hints = typing.get_type_hints(cls)
    if not isinstance(value, dict):
        raise ConfigError(f"{key} holds {value!r}; each entry is a mapping of {', '.join(hints)}")
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            raise ConfigError(f"unknown key {name} in {key}" + (f"; did you mean {near[0]}?" if near else ""))
    return cls(**{name: _coerce(f"{key}.{name}", item, hints[name]) for name, item in value.items()})


def _type_name(hint: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
