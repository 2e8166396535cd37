"""The interface of functions that read a source, an input dataset in one of the supported formats."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from captionlib.config import configclass
from captionlib.errors import DatasetError

__all__ = ["ImageRecord", "SkipCounter", "SourceOptions", "SourceReader"]


@dataclass(slots=True)  # not frozen, because frozen instances take three times as long to create
class ImageRecord:
    """An image of a source, which becomes a row of the manifest: the Parquet dataset that lists the images."""

    image_id: str  # unique in the source, and the same on every run
    uri: str  # absolute path or URL of the image
    split: str  # such as `train`; empty if unknown
    captions: tuple[str, ...]
    origin: str = field(default="", compare=False)  # file and line (or row, or entry), for error messages
    version: str = field(default="", compare=False)  # changes when the image file changes; if empty, computed from it


class SkipCounter:
    """Counts the skipped items of a source by reason.

    An ignored item is skipped by design, such as a hidden file. A rejected item is an image or a caption with an error.

    If `strict` is true, a rejected item is an error.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self.counts: Counter[str] = Counter()  # of skipped items by reason
        self.examples: dict[str, str] = {}  # first rejected item by reason
        self.caption_reasons: set[str] = set()  # for which captions were rejected

    def count_ignored(self, reason: str) -> None:
        self.counts[reason] += 1

    def reject_image(self, reason: str, example: str) -> None:
        """Counts an image whose entry in the source is invalid, or raises DatasetError if the counter is strict.

        `reason` is a short category. `example` says where the entry is and, optionally, what is wrong with it.
        """
        example = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in example)
        if self._strict:
            raise DatasetError(f"{example}: {reason}; correct it, or omit --strict to skip it")
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def reject_captions(self, reason: str, example: str) -> None:
        """Counts an entry whose captions are invalid or belong to no image; see `reject_image`."""
        self.reject_image(reason, example)
        self.caption_reasons.add(reason)

    def describe(self) -> str:
        """Formats the reasons with their counts and examples for error messages."""
        reasons = [
            f"{reason} ({count}{', such as ' + self.examples[reason] if reason in self.examples else ''})"
            for reason, count in self.counts.most_common()
        ]
        return ", ".join(reasons) or "nothing"


@configclass
class SourceOptions:
    """How to read a source.

    Attributes:
        image_root: folder that image paths are relative to. If None, the folder of the source is used.
        default_split: split of images for which the source specifies none. For COCO, it takes precedence over the split
            that the file name contains.
        split_files: for Flickr8k and Flickr30k, the file of image names for each split. If empty, the official split
            files in the folder of the captions are used, if they exist.
        id_column: table column (or key in the JSON of a WebDataset sample) with the image id.
        uri_column: table column with the image's path or URL.
        image_column: Parquet column with the encoded images.
        caption_columns: table columns (or keys in the JSON of a WebDataset sample) with captions.
        caption_language: key of the captions to include if captions are a map or an object, such as `{"en": "a dog"}`.
            If None, all captions in a map are included.
        split_column: table column with the split.
        version_column: table column with a version of the image, such as a hash or a date. If None, the version is
            computed from the metadata of the image file or, if there is none, from its URI.
        captions: whether to include captions.
        columns: names of all columns, for a CSV or TSV table without a header.
        tsv_quotes: whether cells of TSV tables may be quoted, as in CSV.
    """

    image_root: str | None = None
    default_split: str = ""
    split_files: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None
    uri_column: str | None = None
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    caption_language: str | None = None
    split_column: str | None = None
    version_column: str | None = None
    captions: bool = True
    columns: tuple[str, ...] = ()
    tsv_quotes: bool = False


SourceReader: TypeAlias = Callable[[Sequence[str], SourceOptions, SkipCounter], Iterator[ImageRecord]]
"""A function that yields the images at paths, URLs or globs, in the same order on every run."""
