"""Selects the table columns that contain the id, uri (path or URL), captions and split of each image."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from captionlib.data.sources.rows import SourceOptions
from captionlib.errors import ConfigError

__all__ = ["CAPTION_NAMES", "Columns", "list_columns", "select_caption_columns", "select_columns"]

# Conventional column names, in order of preference; case is ignored.
_ID_NAMES = ("image_id", "id", "imageid", "img_id", "imgid", "cocoid", "key")
_URI_NAMES = (
    *("uri", "url", "image_uri", "image_url", "path", "image_path", "file_path", "filepath"),
    *("file_name", "filename", "image", "image_name", "file"),
)
CAPTION_NAMES = ("captions", "caption", "sentences", "sentence", "text", "texts", "raw", "comment")
_SPLIT_NAMES = ("split", "subset")

# Limits on the column names in error messages: number of names, and length of a name.
_SHOWN_COLUMNS = 20
_SHOWN_CHARACTERS = 40

_NUMBERED_CAPTION = re.compile(r"(?i)(?:caption|sentence)[ _]?\d+")


@dataclass(frozen=True)
class Columns:
    """Names of the table columns to read, or None for a column that the table does not have; see `SourceOptions`."""

    uri: str
    id: str | None
    captions: tuple[str, ...]
    split: str | None
    version: str | None = None

    @property
    def names(self) -> list[str]:
        names = (self.uri, self.id, *self.captions, self.split, self.version)
        return list(dict.fromkeys(name for name in names if name is not None))


def select_columns(
    available: Sequence[str], options: SourceOptions, table: str, image_column: str | None = None
) -> Columns:
    """Returns the columns specified in `options`, or those with conventional names.

    `image_column` is the column with the images, if they are in the table. `table` is its address.

    Raises:
        ConfigError: a specified column or the uri column is missing, or two columns match the same name.
    """
    uri = image_column or _select_column(available, options.uri_column, _URI_NAMES, table)
    if uri is None:
        raise ConfigError(
            f"{table}: no column for the image uris; expected one of {', '.join(_URI_NAMES)}, "
            f"got {list_columns(available)}; specify it with --uri-column or, if the table has no header, specify all "
            "columns with --columns"
        )
    return Columns(
        uri=uri,
        id=_select_column(available, options.id_column, _ID_NAMES, table),
        captions=select_caption_columns(available, options.caption_columns, table),
        split=_select_column(available, options.split_column, _SPLIT_NAMES, table),
        version=_select_column(available, options.version_column, (), table),
    )


def _select_column(available: Sequence[str], name: str | None, conventional: Sequence[str], table: str) -> str | None:
    """Returns the column called `name`. If `name` is None, returns the first conventional name in the table, if any."""
    if name is not None:
        if name not in available:
            raise ConfigError(f"{table}: column {name!r} not found; the table has {list_columns(available)}")
        matches = [column for column in available if column == name]
    else:
        lowercase = [column.strip().lower() for column in available]
        first = next((candidate for candidate in conventional if candidate in lowercase), None)
        matches = [column for column, lower in zip(available, lowercase, strict=True) if lower == first]
    if len(matches) > 1:
        raise ConfigError(
            f"{table}: expected one column of each name, got {len(matches)}: {', '.join(matches)}; rename or "
            "remove all but one"
        )
    return matches[0] if matches else None


def select_caption_columns(available: Sequence[str], names: Sequence[str], table: str) -> tuple[str, ...]:
    """Returns the columns called `names`, or the one with a conventional name, or all numbered ones (`caption_0`).

    Raises:
        ConfigError: a column is missing or ambiguous.
    """
    column = None if names else _select_column(available, None, CAPTION_NAMES, table)
    if column is not None:
        return (column,)
    names = names or [name for name in available if _NUMBERED_CAPTION.fullmatch(name.strip())]
    return tuple(column for name in names if (column := _select_column(available, name, (), table)) is not None)


def list_columns(available: Sequence[str]) -> str:
    """Formats the first column names for error messages."""
    names = [" ".join(name.split())[:_SHOWN_CHARACTERS] for name in available[:_SHOWN_COLUMNS]]
    names += ["..."] * (len(available) > _SHOWN_COLUMNS)
    return f"the columns {', '.join(names)}" if names else "no columns"
