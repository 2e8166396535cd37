"""Opens training and validation text for language models: captions of a dataset, or a text file."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from captionlib.data.batches.captions import read_captions
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE
from captionlib.data.sources.locations import Location, locate, read_lines
from captionlib.errors import ConfigError, DatasetError
from captionlib.storage.folders import Folder

__all__ = ["Corpus", "TextLayout", "open_corpus"]

TextLayout = Literal["sentences", "continuous"]
"""Layout of a text file: one sentence per line, or one continuous text that includes its line breaks."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation text. The functions read it from disk, as sentences or as one continuous text."""

    fingerprint: str  # hash of the text
    read_training: Callable[[], Iterator[str]]
    read_validation: Callable[[], Iterator[str]]


def open_corpus(
    source: str | os.PathLike[str],
    layout: TextLayout = "sentences",
    train_splits: Sequence[str] = ("train", "restval"),
    validation_splits: Sequence[str] = ("val", "dev"),
    validation_fraction: float = 0.05,
) -> Corpus:
    """Opens the captions of a dataset, or a text file.

    Args:
        source: manifest or features dataset (both contain captions), or a UTF-8 text file (also .gz, .bz2, .xz).
        layout: layout of a text file.
        train_splits: splits of a dataset.
        validation_splits: splits of a dataset.
        validation_fraction: fraction of a text file.

    Raises:
        DatasetError: the dataset is incomplete or of another kind, or the text file is unreadable or too short.
        ConfigError: the source is a dataset and `layout` is `continuous`.
    """
    if Folder(source).exists(DESCRIPTION_FILE):
        if layout == "continuous":
            raise ConfigError(
                f"layout=continuous expects a text file, got the dataset {os.fspath(source)}; set layout=sentences"
            )
        return _open_dataset(source, train_splits, validation_splits)
    location = locate(os.fspath(source))
    read = partial(_read_sentences if layout == "sentences" else _read_continuous, location, validation_fraction)
    corpus = Corpus(_hash_text(location), partial(read, validation=False), partial(read, validation=True))
    for purpose, texts in (("training", corpus.read_training()), ("validation", corpus.read_validation())):
        if not any(text.strip() for text in texts):
            raise DatasetError(
                f"{location.address}: expected text for {purpose}, got none at validation_fraction="
                f"{validation_fraction}; use a longer text, or change validation_fraction"
            )
    return corpus


def _open_dataset(
    source: str | os.PathLike[str], train_splits: Sequence[str], validation_splits: Sequence[str]
) -> Corpus:
    dataset = open_dataset(source).require_complete()
    if dataset.kind not in ("features", "manifest"):
        raise DatasetError(f"{dataset.folder.uri}: expected a dataset of kind features or manifest, got {dataset.kind}")
    # If there are no validation captions, this raises an error now instead of after the first epoch.
    next(read_captions(dataset, validation_splits))
    read = partial(read_captions, dataset)
    return Corpus(dataset.compute_content_checksum(), partial(read, train_splits), partial(read, validation_splits))


def _read_sentences(location: Location, validation_fraction: float, validation: bool) -> Iterator[str]:
    """Yields the lines for training or validation. Validation lines are evenly spaced to cover the whole file."""
    lines = (line.rstrip("\r\n") for line in read_lines(location) if line.strip())
    for number, line in enumerate(lines, 1):
        if (int(number * validation_fraction) > int((number - 1) * validation_fraction)) == validation:
            yield line


def _read_continuous(location: Location, validation_fraction: float, validation: bool) -> Iterator[str]:
    text = "".join(line.rstrip("\r\n") + "\n" for line in read_lines(location))
    end = len(text) - int(len(text) * validation_fraction)
    yield text[end:] if validation else text[:end]


def _hash_text(location: Location) -> str:
    digest = hashlib.sha256()
    for line in read_lines(location):
        digest.update(line.encode())
    return digest.hexdigest()
