"""Fills frozen dataclasses from YAML files and `key=value` overrides, and refuses what does not fit."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from captionlib.errors import ConfigError

__all__ = ["build_config", "differences", "load_config", "parse_override", "to_dict"]

Config = TypeVar("Config")


def load_config(config_type: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Fills `config_type` from its defaults, then a YAML file, then overrides such as `training.epochs=5`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is of the wrong kind.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"configuration {path} cannot be read: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"configuration {path} is not YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"configuration {path}: expected `key: value` lines, got {type(loaded).__name__}")
        values = loaded or {}
    for override in overrides:
        keys, value = parse_override(override)
        _set_nested(values, keys, value)
    return build_config(config_type, values, origin=str(path) if path else "options")


def build_config(config_type: type[Config], values: Mapping[str, Any], origin: str = "configuration") -> Config:
    """Fills `config_type` from `values`; nested dataclasses from nested mappings.

    What a nested mapping leaves out is as in the outer dataclass's own default, where that differs from the inner's.

    Raises:
        ConfigError: names each field that is wrong, and for an unknown key the known ones.
    """
    _refuse_unknown_keys(config_type, values, prefix="", origin=origin)
    try:
        return TypeAdapter(config_type).validate_python(_with_defaults(config_type, values))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'value'}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        )
        raise ConfigError(f"{origin}: {problems}") from error


def parse_override(override: str) -> tuple[list[str], Any]:
    """Splits `training.epochs=5` into its keys and its value, read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: expected key=value, such as training.epochs=5")
    try:
        return key.strip().split("."), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for YAML and JSON."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields in which two nested configurations differ, a phrase each; none where they are equal."""
    there, here = _flatten(before), _flatten(now)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return [f"{name}: there {there.get(name)!r}, now {here.get(name)!r}" for name in names]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _set_nested(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {'.'.join(keys)}: {key} is a value, not a section")
        values = inner
    values[keys[-1]] = value


def _with_defaults(config_type: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    for field in dataclasses.fields(config_type):
        given, factory = values.get(field.name), field.default_factory
        if isinstance(given, Mapping) and dataclasses.is_dataclass(field.type):
            defaults = {} if factory is dataclasses.MISSING else to_dict(factory())
            filled[field.name] = _with_defaults(field.type, _merge(defaults, given))
    return filled


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above`, and of `below` what it leaves open, at every depth."""
    merged = {**below, **above}
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(inner := below.get(name), Mapping):
            merged[name] = _merge(inner, value)
    return merged


def _refuse_unknown_keys(config_type: Any, values: Mapping[str, Any], prefix: str, origin: str) -> None:
    known = {field.name: field.type for field in dataclasses.fields(config_type)}
    for key, value in values.items():
        if key not in known:
            names = ", ".join(prefix + name for name in known)
            raise ConfigError(f"{origin}: unknown key {prefix}{key}; known: {names}")
        if dataclasses.is_dataclass(known[key]) and isinstance(value, Mapping):
            _refuse_unknown_keys(known[key], value, f"{prefix}{key}.", origin)
