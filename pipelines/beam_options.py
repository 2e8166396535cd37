"""Converts Beam options in YAML files to command-line flags; `@FILE` stands for the options in a file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from captionlib.config import parse_yaml
from captionlib.errors import ConfigError
from captionlib.recipes import find_recipe

__all__ = ["expand_option_files", "to_flags"]


def expand_option_files(flags: Sequence[str]) -> list[str]:
    """Replaces each `@FILE` (a path, or the name of a file in configs/runners) with flags. Later flags take precedence.

    Raises:
        ConfigError: a file cannot be read, or its content is not a mapping of options.
    """
    expanded: list[str] = []
    for flag in flags:
        expanded += _read_flags(flag[1:]) if flag.startswith("@") else [flag]
    return expanded


def to_flags(options: Mapping[str, Any], path: str) -> Iterator[str]:
    """Converts options to flags: `true` to a flag without a value, a list to repeated flags, a mapping to JSON.

    Raises:
        ConfigError: a value in the file `path` is false or null, for which Beam has no uniform flag.
    """
    for name, values in options.items():
        for value in values if isinstance(values, list) else [values]:
            if value is True:
                yield f"--{name}"
            elif value is None or value is False:
                raise ConfigError(
                    f"{path}: {name} is {value}, which has no flag in Beam; set it to true, a number or text, or "
                    "remove the line"
                )
            else:
                yield f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}"


def _read_flags(path: str) -> list[str]:
    try:
        options = parse_yaml(find_recipe(path, "runners").read_text(encoding="utf-8"), f"Beam options {path}")
    except OSError as error:
        raise ConfigError(f"Beam options {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Beam options {path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: expected `option: value` lines, got {type(options).__name__}")
    return list(to_flags(options, path))
