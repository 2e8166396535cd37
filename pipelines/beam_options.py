"""Beam's own options, as flags and in files: `@FILE` stands for the options of a YAML."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from captionlib.errors import ConfigError
from captionlib.recipes import find_recipe

__all__ = ["expand_option_files", "to_flags"]


def expand_option_files(flags: Sequence[str]) -> list[str]:
    """The flags, with those of its file in place of each `@FILE`; of a flag that is given twice Beam takes the last.

    Raises:
        ConfigError: a file cannot be read, or its values are no options.
    """
    return [one for flag in flags for one in (_read(flag[1:]) if flag.startswith("@") else [flag])]


def to_flags(options: Mapping[str, Any], origin: str) -> Iterator[str]:
    """Options as flags: `true` is a bare flag, a list repeats its flag, a mapping is JSON.

    Raises:
        ConfigError: a value is false or empty, for which Beam's flags have no common spelling.
    """
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                yield f"--{name}"
            elif one is None or one is False:
                raise ConfigError(f"{origin}: {name} is {one}; expected a value or true; leave the line out instead")
            else:
                yield f"--{name}={json.dumps(one) if isinstance(one, Mapping) else one}"


def _read(path: str) -> list[str]:
    try:
        options = yaml.safe_load(find_recipe(path, "runners").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"options of Beam in {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"options of Beam in {path} are not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: expected `option: value` lines, got {type(options).__name__}")
    return list(to_flags(options, path))
