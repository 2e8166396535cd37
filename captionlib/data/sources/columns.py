"""Chooses the columns of a table that make a manifest's rows, and reads their values."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from captionlib.data.sources.rows import SourceOptions, clean_captions
from captionlib.errors import ConfigError, DatasetError

__all__ = [
    "CAPTION_NAMES",
    "ID_NAMES",
    "Columns",
    "choose_captions",
    "choose_column",
    "choose_columns",
    "to_captions",
    "to_text",
]

# Tried in this order, whatever their case.
ID_NAMES = ("image_id", "id", "imageid", "img_id", "imgid", "cocoid", "key")
URI_NAMES = (
    *("uri", "url", "image_uri", "image_url", "path", "image_path", "file_path", "filepath"),
    *("file_name", "filename", "image", "image_name", "file"),
)
CAPTION_NAMES = ("captions", "caption", "sentences", "sentence", "text", "texts", "raw", "comment")
SPLIT_NAMES = ("split", "subset")

_NUMBERED = re.compile(r"(?i)(?:caption|sentence)[ _]?\d+")


@dataclass(frozen=True)
class Columns:
    """The columns of a table by their part in a row; None where it has none."""

    uri: str
    id: str | None
    captions: tuple[str, ...]
    split: str | None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.uri, self.id, *self.captions, self.split) if name is not None))


def choose_columns(available: Sequence[str], options: SourceOptions, table: str) -> Columns:
    """The columns that were asked for, or those with the usual names.

    Raises:
        ConfigError: one is missing; lists those that there are.
    """
    uri = choose_column(available, options.uri_column, URI_NAMES, table)
    if uri is None:
        raise ConfigError(
            f"{table}: no column for the images' uris; expected one of {', '.join(URI_NAMES)}, "
            f"got {describe(available)}; name it with --uri-column"
        )
    return Columns(
        uri=uri,
        id=choose_column(available, options.id_column, ID_NAMES, table),
        captions=choose_captions(available, options.caption_columns, table),
        split=choose_column(available, options.split_column, SPLIT_NAMES, table),
    )


def choose_column(available: Sequence[str], asked: str | None, usual: Sequence[str], table: str) -> str | None:
    """The column that was asked for, the first with a usual name, or None.

    Raises:
        ConfigError: the one that was asked for is missing.
    """
    if asked is not None:
        if asked not in available:
            raise ConfigError(f"{table}: no column {asked!r}; it has {describe(available)}")
        return asked
    spelled = {name.strip().lower(): name for name in reversed(available)}
    return next((spelled[name] for name in usual if name in spelled), None)


def choose_captions(available: Sequence[str], asked: Sequence[str], table: str) -> tuple[str, ...]:
    """The columns of captions: those asked for, one with a usual name, or caption_0, caption_1 and so on.

    Raises:
        ConfigError: one that was asked for is missing.
    """
    if asked:
        return tuple(name for one in asked if (name := choose_column(available, one, (), table)) is not None)
    usual = choose_column(available, None, CAPTION_NAMES, table)
    return (usual,) if usual is not None else tuple(name for name in available if _NUMBERED.fullmatch(name.strip()))


def describe(available: Sequence[str]) -> str:
    return f"the columns {', '.join(available)}" if available else "no columns"


def to_text(value: object, origin: str, column: str) -> str:
    """An id, a uri or a split as text; empty for none.

    Raises:
        DatasetError: it is neither text nor a whole number: others would not be spelled alike on every run.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DatasetError(
        f"{origin}, column {column}: expected text or a whole number, got {type(value).__name__} {value!r:.40}"
    )


def to_captions(values: Sequence[object], origin: str) -> tuple[str, ...]:
    """The captions in the cells of a row; a cell may hold one, a list, or a list as JSON."""
    if len(values) == 1 and isinstance(values[0], str) and not values[0].startswith("["):
        return clean_captions(values[0], origin)  # nearly all rows of nearly all tables
    return tuple(caption for value in values for caption in clean_captions(_unpack(value), origin))


def _unpack(value: object) -> object:
    """The list in a text such as `["a dog", "two dogs"]`, as tables without list columns write it."""
    if not isinstance(value, str) or not value.startswith('["'):
        return value
    try:
        listed = json.loads(value)
    except json.JSONDecodeError:
        return value
    return listed if isinstance(listed, list) and all(isinstance(one, str) for one in listed) else value
