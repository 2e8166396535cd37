"""The rows that every source yields, what a source leaves out, and the options for reading one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from captionlib.config import configclass
from captionlib.errors import DatasetError

__all__ = ["ManifestRow", "RowReader", "SkipCounter", "SourceOptions"]


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


class SkipCounter:
    """Counts what a source leaves out, by reason, and remembers an example of each.

    Args:
        strict: raise an error rather than leave out an image or captions because of damage.

    Attributes:
        counts: the number of items by reason.
        examples: the place of the first item, by reason.
        captions: the reasons for which only captions were left out.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.captions: set[str] = set()

    def skip(self, reason: str) -> None:
        """Counts an item that is left out by design, such as a hidden file."""
        self.counts[reason] += 1

    def skip_image(self, reason: str, origin: str) -> None:
        """Counts an image that is left out because it is damaged.

        Raises:
            DatasetError: the counter is strict.
        """
        origin = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in origin)
        if self._strict:
            raise DatasetError(f"{origin}: {reason}; correct it, or leave out --strict to skip it")
        self.skip(reason)
        self.examples.setdefault(reason, origin)

    def skip_captions(self, reason: str, origin: str) -> None:
        """Counts captions that are left out because they are damaged or belong to no image.

        Raises:
            DatasetError: the counter is strict.
        """
        self.skip_image(reason, origin)
        self.captions.add(reason)

    def describe(self) -> str:
        """Returns the reasons with their counts and examples as a phrase for error messages."""
        reasons = [
            f"{reason} ({count}{', such as ' + self.examples[reason] if reason in self.examples else ''})"
            for reason, count in self.counts.most_common()
        ]
        return ", ".join(reasons) or "nothing"


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
        uri_column: the table column that holds the image's path or URL.
        image_column: the Parquet column that holds the bytes of the images.
        caption_columns: the table columns, or the keys in a WebDataset sample's JSON, that hold captions.
        split_column: the table column that holds the split.
        captions: whether to include captions.
        columns: the names of all columns of a CSV or TSV table that has no header.
        tsv_quotes: whether cells of TSV tables may be quoted, as in CSV.
    """

    image_root: str | None = None
    default_split: str = ""
    split_files: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None
    uri_column: str | None = None
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    split_column: str | None = None
    captions: bool = True
    columns: tuple[str, ...] = ()
    tsv_quotes: bool = False


class RowReader(Protocol):
    """Yields the rows of all `addresses` in a fixed order, in bounded memory."""

    def __call__(
        self, addresses: Sequence[str], options: SourceOptions, skips: SkipCounter
    ) -> Iterator[ManifestRow]: ...
