"""Parses untyped values from JSON files and tables into ids, texts and captions.

JSON `null`, NaN and blank text count as missing. Functions raise EntryError for a value of a different type. Its
message contains `origin` (file and line) and `field` (name of the value).
"""

import ast
import contextlib
import json
import math
import re
import reprlib
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from captionlib.errors import DatasetError, EntryError

__all__ = [
    "describe_value",
    "is_missing",
    "is_unicode",
    "parse_captions",
    "parse_cell",
    "parse_id",
    "parse_json",
    "parse_list",
    "parse_object",
    "parse_optional",
    "parse_text",
]

_MAX_EXACT_FLOAT = 2**53  # larger floats no longer identify a single integer
_MAX_CAPTION_DEPTH = 4

# Floats as pandas and other libraries print them. `4e5` is excluded because it may be a hexadecimal id.
_PRINTED_FLOAT = re.compile(r"[+-]?\d+\.\d+(?:[eE][+-]?\d+)?|[+-]?\d+[eE][+-]\d+")
_PRINTED_NULLS = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>"})

# A list that a program printed as text. A caption in brackets, such as `[a dog barks]`, does not match.
_PRINTED_LIST = re.compile(r"""\[\s*(?:['"\[{].*|)\]""", re.DOTALL)
_PYTHON_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PYTHON_LIST = re.compile(rf"\[\s*{_PYTHON_STRING}(?:\s*,\s*{_PYTHON_STRING})*\s*,?\s*\]", re.DOTALL)

_KINDS = {str: "text", bool: "boolean", int: "number", float: "number", list: "list", dict: "object"}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlist, _REPR.maxdict = 2, 80, 80, 4, 4


class _DuplicateKeyError(Exception):
    """A JSON object repeats a key."""


def parse_json(text: str, origin: str) -> Any:
    """Parses JSON. Raises DatasetError if the text is invalid or repeats a key."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise DatasetError(f"{origin}, {line}column {error.colno}: not JSON: {error.msg}; correct the file") from error
    except _DuplicateKeyError as error:
        raise DatasetError(f"{origin}: expected each key once per object, got {error} twice; remove one") from None
    except RecursionError:
        raise DatasetError(f"{origin}: expected a few levels of nesting, got hundreds; flatten the value") from None
    except ValueError:  # Python limits the number of digits of integers
        raise DatasetError(
            f"{origin}: expected shorter numbers, got one with thousands of digits; write it as text"
        ) from None


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(describe_value(next(key for key in keys if keys.count(key) > 1)))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_to_object)


def describe_value(value: object) -> str:
    if value is None:
        return "no value"
    if isinstance(value, str) and not value.strip():
        return "blank text"
    return f"{_KINDS.get(type(value), type(value).__name__)} {_REPR.repr(value)}"


def is_missing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_unicode(text: str) -> bool:
    """Returns whether text can be encoded as UTF-8. Text with lone surrogates cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_cell(cell: str, numeric: bool = False) -> object:
    """Returns the stripped text of a cell, or None if the text stands for a missing value, such as `nan`.

    If `numeric` is true, a cell such as `391895.0` (an id that pandas wrote as a float) is converted to a float.
    """
    text = cell.strip()
    if text in _PRINTED_NULLS:
        return None
    return float(text) if numeric and _PRINTED_FLOAT.fullmatch(text) else text


def _entry_error(origin: str, field: str, expected: str, value: object) -> EntryError:
    return EntryError(f"invalid {field}", f"{origin}: expected {field} as {expected}, got {describe_value(value)}")


def parse_text(value: object, origin: str, field: str) -> str:
    """Returns `value`, which must be text and not blank."""
    if isinstance(value, str) and value.strip():
        return value
    raise _entry_error(origin, field, "text", value)


def parse_id(value: object, origin: str, field: str) -> str:
    """Returns an id (or a similar value, such as a split) as text. Numbers of any type must be exact integers."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_EXACT_FLOAT:
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    raise _entry_error(origin, field, "text or an integer", value)


def parse_optional(
    parse: Callable[[object, str, str], str], value: object, origin: str, field: str, default: str = ""
) -> str:
    """Returns `parse(value, origin, field)`, or `default` if the value is missing."""
    return default if is_missing(value) else parse(value, origin, field)


def parse_list(value: object, origin: str, field: str) -> list[Any]:
    if isinstance(value, list):
        return value
    raise _entry_error(origin, field, "a list", value)


def parse_object(value: object, origin: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise EntryError("entry that is not an object", f"{origin}: expected an object, got {describe_value(value)}")


def parse_captions(value: object, origin: str, field: str, depth: int = 0) -> tuple[str, ...]:
    """Returns the captions in a text, an object with `raw`, `caption` or `tokens`, or a list of these.

    A text may also contain a list in JSON or Python syntax: `["a dog", "two dogs"]`. Captions are stripped;
    missing captions are dropped. `depth` counts the lists and objects that contain the value.
    """
    if is_missing(value):
        return ()
    if isinstance(value, str):
        caption = value.strip()
        if not caption.startswith("[") or not _PRINTED_LIST.fullmatch(caption):
            return (caption,)
        value = _parse_printed_list(caption, origin, field)
    if depth <= _MAX_CAPTION_DEPTH:
        if isinstance(value, list):
            return tuple(caption for item in value for caption in parse_captions(item, origin, field, depth + 1))
        if isinstance(value, dict) and value.keys() & {"raw", "caption", "tokens"}:
            for key in ("raw", "caption"):
                if not is_missing(value.get(key)):
                    return parse_captions(value[key], origin, f"{field}.{key}", depth + 1)
            return _join_tokens(value.get("tokens"), origin, f"{field}.tokens")
    raise _entry_error(origin, field, "text or a list of texts", value)


def _join_tokens(tokens: object, origin: str, field: str) -> tuple[str, ...]:
    if is_missing(tokens):
        return ()
    caption = " ".join(parse_text(token, origin, field) for token in parse_list(tokens, origin, field))
    return (caption,) if caption else ()


def _parse_printed_list(text: str, origin: str, field: str) -> object:
    try:
        return parse_json(text, origin)
    except DatasetError as error:
        with contextlib.suppress(SyntaxError, ValueError):
            # NumPy prints arrays without commas. The pattern excludes them: Python would join their adjacent strings.
            if _PYTHON_LIST.fullmatch(text):
                return ast.literal_eval(text)
        raise EntryError(
            f"invalid {field}",
            f'{origin}: expected {field} as a caption or a JSON list such as ["a dog", "two dogs"], '
            f"got {describe_value(text)}",
        ) from error
