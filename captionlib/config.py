"""Configurations: frozen, validated dataclasses that are filled from YAML files and `key=value` overrides.

A configuration class is decorated with `configclass`. Field types define bounds (`epochs: PositiveInt = 20`), and
`__post_init__` checks conditions that involve several fields. Violations raise ConfigError.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import pydantic
import pydantic.dataclasses
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

from captionlib.errors import ConfigError, suggest

__all__ = [
    "apply_overrides",
    "build_config",
    "configclass",
    "describe_differences",
    "load_config",
    "parse_yaml",
    "to_dict",
]

Config = TypeVar("Config")

_EXTENDS = "extends"
_MAX_EXTENDS_DEPTH = 8
_MESSAGES = {"tuple_type": "Input should be a list"}  # replaces Pydantic's message, because YAML has no tuples


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def configclass(cls: type[Config]) -> type[Config]:
    """Turns a class into a frozen dataclass that validates its values against the field types."""
    validated: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
    initialize = validated.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - replaces the generated method
        try:
            initialize(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(f"{cls.__name__}: {_describe_problems(error)}") from error

    validated.__init__ = __init__
    return cast(type[Config], validated)


def load_config(
    config_type: type[Config], path: str | Path | None, overrides: Sequence[str] = (), defaults: Sequence[str] = ()
) -> Config:
    """Creates a configuration from a YAML file and overrides such as `training.epochs=5`.

    `defaults` have the form of overrides and replace the defaults of `config_type`. A file may extend another file with
    `extends: base.yaml`, a path relative to the extending file. Sections are merged.
    """
    values: dict[str, Any] = {}
    apply_overrides(values, defaults)
    if path is not None:
        values = _merge(values, _read_yaml(Path(path)))
    apply_overrides(values, overrides)
    return build_config(config_type, values, origin=str(path) if path else "options")


def build_config(config_type: type[Config], values: Mapping[str, Any], origin: str = "configuration") -> Config:
    """Creates a configuration from a mapping of keys to values. Nested mappings fill nested sections.

    A missing key of a section gets its value from the section's default in the enclosing class. Error messages begin
    with `origin`, such as the path of the file that contains the values.
    """
    _check_keys(config_type, values, prefix="", origin=origin)
    try:
        config = TypeAdapter(config_type).validate_python(_with_defaults(config_type, values))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_describe_problems(error)}") from error
    _check_booleans(values, to_dict(config), f"{origin}: ")
    return config


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets the values of overrides such as `training.epochs=5` in a nested mapping."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r}: expected key=value, such as training.epochs=5")
        *sections, name = key.strip().split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {key.strip()}: {section} is a value, not a section")
        inner[name] = parse_yaml(text, f"--set {override!r}")


def parse_yaml(text: str, origin: str) -> Any:
    """Parses YAML without aliases and repeated keys. Error messages begin with `origin`, such as a path."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ConfigError(f"{origin} is not YAML: nested too deeply") from error
    except Exception as error:  # PyYAML raises various exceptions on invalid tags and values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{origin} is not YAML: {reason}") from error


class _Loader(yaml.SafeLoader):
    """Rejects aliases and repeated keys.

    With aliases that refer to other aliases, a few lines can describe billions of values, or a cycle.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("expected no aliases (*name), got one; repeat the value instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := [key for key, count in counts.items() if count > 1]:
            raise yaml.YAMLError(f"expected each key once, got {repeated[0]} twice")
        return super().construct_mapping(node, deep)


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a configuration to plain values for YAML and JSON."""
    return cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))


def describe_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], labels: tuple[str, str] = ("was", "now")
) -> list[str]:
    """Returns a line such as `epochs: was 5, now 6` for each value that differs between two nested configurations."""
    old, new = _flatten(before), _flatten(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {labels[0]} {old.get(name)!r}, {labels[1]} {new.get(name)!r}" for name in names]


def _describe_problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: "
        f"{_MESSAGES.get(problem['type'], problem['msg'])}, got {problem['input']!r}"
        for problem in error.errors()
    )


def _read_yaml(path: Path, depth: int = 0) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), f"configuration {path}")
    except OSError as error:
        raise ConfigError(f"configuration {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {path} is not YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path}: expected `key: value` lines, got {type(values).__name__}")
    base = values.pop(_EXTENDS, None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"configuration {path}: {_EXTENDS}: expected the path of a YAML file, got {base!r}")
    if depth == _MAX_EXTENDS_DEPTH:
        raise ConfigError(f"configuration {path}: expected at most {_MAX_EXTENDS_DEPTH} levels of {_EXTENDS}, got more")
    return _merge(_read_yaml(path.parent / base, depth + 1), values)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _with_defaults(config_type: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in the keys that nested sections omit; see `build_config`."""
    filled = dict(values)
    for field in dataclasses.fields(config_type):
        section, factory = values.get(field.name), field.default_factory
        section_type = _section_type(field.type)
        if isinstance(section, Mapping) and section_type is not None:
            defaults = {} if factory is dataclasses.MISSING else to_dict(factory())
            filled[field.name] = _with_defaults(section_type, _merge(defaults, section))
    return filled


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Merges `values` into a copy of `base`, recursively for nested sections."""
    merged = {**base, **values}
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(section := base.get(name), Mapping):
            merged[name] = _merge(section, value)
    return merged


def _check_keys(config_type: Any, values: Mapping[str, Any], prefix: str, origin: str) -> None:
    known = {field.name: field.type for field in dataclasses.fields(config_type)}
    for key, value in values.items():
        if key not in known:
            names = ", ".join(prefix + name for name in known)
            hint = suggest(f"{prefix}{key}", [prefix + name for name in known])
            raise ConfigError(f"{origin}: unknown key {prefix}{key}{hint}; known keys: {names}")
        section = _section_type(known[key])
        if section is not None and isinstance(value, Mapping):
            _check_keys(section, value, f"{prefix}{key}.", origin)
        if section is not None and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    _check_keys(section, item, f"{prefix}{key}.{index}.", origin)


def _section_type(field_type: Any) -> Any | None:
    """Returns the dataclass C of a field of type `C`, `C | None` or `tuple[C, ...]`. Returns None for other types."""
    types = [field_type, *get_args(field_type)]
    return next((section for section in types if dataclasses.is_dataclass(section)), None)


def _check_booleans(given: Any, converted: Any, prefix: str) -> None:
    """Rejects booleans that Pydantic converted to numbers, and numbers that it converted to booleans."""
    if isinstance(given, Mapping) and isinstance(converted, Mapping):
        for key, value in given.items():
            _check_booleans(value, converted.get(key), f"{prefix}{key}.")
    elif isinstance(given, list | tuple) and isinstance(converted, list | tuple):
        for value, converted_value in zip(given, converted, strict=False):
            _check_booleans(value, converted_value, prefix)
    elif isinstance(given, bool) != isinstance(converted, bool) and isinstance(given, int | float):
        expected = "a number" if isinstance(given, bool) else "true or false"
        raise ConfigError(f"{prefix.removesuffix('.')}: expected {expected}, got {given!r}")
