"""Checks that every section of the run configuration makes of its values; each names the key and what it may be."""

from mellow_ds.errors import ConfigError


def at_least(section: str, config: object, minimum: float, *names: str) -> None:
    """Raise `ConfigError` where one of the named fields is below `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise ConfigError(f"{section}.{name} is {value}; it must be at least {minimum}")


def one_of(section: str, config: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` where the named field is none of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{section}.{name} is '{value}'; choose one of {', '.join(choices)}")
