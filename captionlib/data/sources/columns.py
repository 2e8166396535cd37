"""Selects the table columns that fill a manifest row, and converts their values."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from captionlib.data.sources.rows import SourceOptions, parse_captions
from captionlib.errors import ConfigError, DatasetError

__all__ = [
    "CAPTION_NAMES",
    "ID_NAMES",
    "SPLIT_NAMES",
    "Columns",
    "list_columns",
    "select_caption_columns",
    "select_column",
    "select_columns",
    "to_captions",
    "to_text",
]

# Conventional column names, in order of preference; case is ignored.
ID_NAMES = ("image_id", "id", "imageid", "img_id", "imgid", "cocoid", "key")
URI_NAMES = (
    *("uri", "url", "image_uri", "image_url", "path", "image_path", "file_path", "filepath"),
    *("file_name", "filename", "image", "image_name", "file"),
)
CAPTION_NAMES = ("captions", "caption", "sentences", "sentence", "text", "texts", "raw", "comment")
SPLIT_NAMES = ("split", "subset")

_NUMBERED_CAPTION = re.compile(r"(?i)(?:caption|sentence)[ _]?\d+")


@dataclass(frozen=True)
class Columns:
    """The table columns that fill a manifest row; None for those that the table lacks."""

    uri: str
    id: str | None
    captions: tuple[str, ...]
    split: str | None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.uri, self.id, *self.captions, self.split) if name is not None))


def select_columns(available: Sequence[str], options: SourceOptions, table: str) -> Columns:
    """Returns the columns that `options` names, or else those with conventional names.

    Args:
        available: the table's columns.
        options: may name columns.
        table: the table's address, for error messages.

    Raises:
        ConfigError: a named column or the uri column is missing.
    """
    uri = select_column(available, options.uri_column, URI_NAMES, table)
    if uri is None:
        raise ConfigError(
            f"{table}: no column for the image uris; expected one of {', '.join(URI_NAMES)}, "
            f"got {list_columns(available)}; name it with --uri-column"
        )
    return Columns(
        uri=uri,
        id=select_column(available, options.id_column, ID_NAMES, table),
        captions=select_caption_columns(available, options.caption_columns, table),
        split=select_column(available, options.split_column, SPLIT_NAMES, table),
    )


def select_column(available: Sequence[str], name: str | None, conventional: Sequence[str], table: str) -> str | None:
    """Returns the column called `name`; if `name` is None, the first with a conventional name, or None.

    Raises:
        ConfigError: no column is called `name`.
    """
    if name is not None:
        if name not in available:
            raise ConfigError(f"{table}: column {name!r} not found; the table has {list_columns(available)}")
        return name
    by_lowercase = {column.strip().lower(): column for column in reversed(available)}
    return next((by_lowercase[candidate] for candidate in conventional if candidate in by_lowercase), None)


def select_caption_columns(available: Sequence[str], names: Sequence[str], table: str) -> tuple[str, ...]:
    """Returns the columns called `names`, or else one with a conventional name, or else caption_0, caption_1, etc.

    Raises:
        ConfigError: a named column is missing.
    """
    if names:
        return tuple(column for name in names if (column := select_column(available, name, (), table)) is not None)
    column = select_column(available, None, CAPTION_NAMES, table)
    if column is not None:
        return (column,)
    return tuple(name for name in available if _NUMBERED_CAPTION.fullmatch(name.strip()))


def list_columns(available: Sequence[str]) -> str:
    """Returns the column names as a phrase for error messages."""
    return f"the columns {', '.join(available)}" if available else "no columns"


def to_text(value: object, origin: str, column: str) -> str:
    """Returns an id, a uri or a split as text; None becomes empty.

    Raises:
        DatasetError: the value is neither text nor an integer. Other types have no stable spelling.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DatasetError(
        f"{origin}, column {column}: expected text or an integer, got {type(value).__name__} {value!r:.40}"
    )


def to_captions(values: Sequence[object], origin: str) -> tuple[str, ...]:
    """Returns the captions in the cells of a row. A cell holds one caption, a list, or a list encoded as JSON."""
    if len(values) == 1 and isinstance(values[0], str) and not values[0].startswith("["):
        return parse_captions(values[0], origin)  # fast path for nearly all rows
    return tuple(caption for value in values for caption in parse_captions(_decode_list(value), origin))


def _decode_list(value: object) -> object:
    """Decodes text such as `["a dog", "two dogs"]`, which formats without list columns use; returns other values."""
    if not isinstance(value, str) or not value.startswith('["'):
        return value
    try:
        decoded = json.loads(value)
    except json.JSONDecodeError:
        return value
    return decoded if isinstance(decoded, list) and all(isinstance(item, str) for item in decoded) else value
