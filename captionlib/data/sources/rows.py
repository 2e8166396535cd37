"""What every source yields, and what may be asked of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from captionlib.errors import DatasetError

__all__ = ["ManifestRow", "ReadRows", "ReportSkip", "SourceOptions", "clean_captions"]

ReportSkip = Callable[[str], None]
"""Takes the reason why something that a source holds becomes no row."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One image.

    Attributes:
        image_id: unique in the dataset, and the same on every run.
        uri: an absolute path, or an address.
        split: such as train; empty where the source has none.
        captions: what people said of it.
        origin: where the row stands in its source, for messages.
    """

    image_id: str
    uri: str
    split: str
    captions: tuple[str, ...]
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    Attributes:
        image_root: what relative image paths are relative to, in place of the source's own folder.
        default_split: the split of images whose source names none.
        split_files: for Flickr, split to a file of its image names; empty takes the official files beside the captions.
        id_column: of a table, or the key of a tar's JSON members.
        uri_column: of a table; where the images are in the rows, the column that holds them.
        caption_columns: of a table, or the key of a tar's JSON members.
        split_column: of a table.
    """

    image_root: str | None = None
    default_split: str = ""
    split_files: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None
    uri_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    split_column: str | None = None


class ReadRows(Protocol):
    """Reads one family of sources in a fixed order, and holds a bounded part of them."""

    def __call__(
        self, addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip
    ) -> Iterator[ManifestRow]: ...


def clean_captions(value: object, origin: str) -> tuple[str, ...]:
    """The captions in a text, a list of texts, or of objects with a `raw` or `caption`; blank ones are left out.

    Raises:
        DatasetError: it is none of these.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        caption = value.strip()
        return (caption,) if caption else ()
    if isinstance(value, Mapping) and ("raw" in value or "caption" in value):
        return clean_captions(value["raw"] if "raw" in value else value["caption"], origin)
    if isinstance(value, list | tuple):
        return tuple(caption for one in value for caption in clean_captions(one, origin))
    raise DatasetError(
        f"{origin}: expected captions as text or a list of texts, got {type(value).__name__} {value!r:.60}"
    )
