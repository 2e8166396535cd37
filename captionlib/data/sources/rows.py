"""The rows that every source yields, and the options for reading a source."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from captionlib.config import configclass
from captionlib.errors import DatasetError

__all__ = ["ManifestRow", "ReportSkip", "RowReader", "SourceOptions", "parse_captions"]

ReportSkip = Callable[[str], None]
"""Receives the reason for each item of a source that yields no row."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One image.

    Attributes:
        image_id: unique within the dataset, and the same on every run.
        uri: an absolute path or a URL.
        split: such as `train`; empty if unknown.
        captions: the reference captions.
        origin: file and line (or row, or entry) that the row comes from, for error messages.
    """

    image_id: str
    uri: str
    split: str
    captions: tuple[str, ...]
    origin: str = field(default="", compare=False)


@configclass
class SourceOptions:
    """How to read a source.

    Attributes:
        image_root: the folder that relative image paths start from. None uses the folder of the source.
        default_split: the split of images for which the source names none. It also overrides the split that COCO's file
            names imply.
        split_files: for Flickr8k and Flickr30k, the file of image names of each split. Empty uses the official split
            files beside the captions, if they exist.
        id_column: the table column, or the key in a WebDataset sample's JSON, that holds the image id.
        uri_column: the table column that holds the image's path or URL or, for Parquet with embedded images, its bytes.
        caption_columns: the table columns, or the keys in a WebDataset sample's JSON, that hold captions.
        split_column: the table column that holds the split.
    """

    image_root: str | None = None
    default_split: str = ""
    split_files: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None
    uri_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    split_column: str | None = None


class RowReader(Protocol):
    """Yields the rows of all `addresses` in a fixed order, in bounded memory."""

    def __call__(
        self, addresses: Sequence[str], options: SourceOptions, report_skip: ReportSkip
    ) -> Iterator[ManifestRow]: ...


def parse_captions(value: object, origin: str) -> tuple[str, ...]:
    """Returns the captions in a string, an object with a `raw` or `caption` field, or a list of these.

    Surrounding white space and blank captions are dropped.

    Raises:
        DatasetError: `value` is of another type.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        caption = value.strip()
        return (caption,) if caption else ()
    if isinstance(value, Mapping) and ("raw" in value or "caption" in value):
        return parse_captions(value["raw"] if "raw" in value else value["caption"], origin)
    if isinstance(value, list | tuple):
        return tuple(caption for item in value for caption in parse_captions(item, origin))
    raise DatasetError(
        f"{origin}: expected captions as text or a list of texts, got {type(value).__name__} {value!r:.60}"
    )
