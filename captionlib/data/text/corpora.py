"""Sentences, or one long text, that a language model is trained on: of a dataset, or of a text file."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from captionlib.data.batches.captions import read_captions
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import DESCRIPTION_FILE
from captionlib.data.sources.locations import Location, locate, read_lines
from captionlib.errors import ConfigError, DatasetError
from captionlib.storage.folders import Folder

__all__ = ["Corpus", "TextLayout", "open_corpus"]

TextLayout = Literal["sentences", "continuous"]
"""A line a sentence; or one text, in which lines and sentences end as its words or characters say."""


@dataclass(frozen=True)
class Corpus:
    """Texts to learn from, and texts to be tested on, read anew from their source by each call.

    Attributes:
        fingerprint: of what they were read from.
        training: sentences as they were written; or the one running text.
        validation: likewise.
    """

    fingerprint: str
    training: Callable[[], Iterator[str]]
    validation: Callable[[], Iterator[str]]


def open_corpus(
    source: str | os.PathLike[str],
    layout: TextLayout = "sentences",
    train_splits: Sequence[str] = ("train", "restval"),
    validation_splits: Sequence[str] = ("val", "dev"),
    validation_fraction: float = 0.05,
) -> Corpus:
    """Opens the texts of a dataset's captions or of a text file.

    Args:
        source: a `features/` or `manifest/` dataset; or a UTF-8 text file, plain or packed (.gz, .bz2, .xz).
        layout: how a text file is read.
        train_splits: the rows of a dataset to learn from.
        validation_splits: the rows of a dataset to be tested on.
        validation_fraction: the share of a text file to be tested on: every so many lines, or the end of the running text.

    Raises:
        DatasetError: the dataset is not complete or of another kind, or a file cannot be read or has too little text.
        ConfigError: captions of a dataset are to be read as one running text.
    """
    if Folder(source).exists(DESCRIPTION_FILE):
        if layout == "continuous":
            raise ConfigError(
                f"layout continuous is for text files, got the dataset {os.fspath(source)}; use layout sentences"
            )
        return _open_dataset(source, train_splits, validation_splits)
    location = locate(os.fspath(source))
    corpus = (
        _open_sentences(location, validation_fraction)
        if layout == "sentences"
        else _open_continuous(location, validation_fraction)
    )
    for name, texts in (("to learn from", corpus.training()), ("held out", corpus.validation())):
        if not any(one.strip() for one in texts):
            raise DatasetError(
                f"{location.address}: expected text, got none {name} with {validation_fraction:.0%} of it held out; "
                "give a longer text, or hold out another share"
            )
    return corpus


def _open_dataset(
    source: str | os.PathLike[str], train_splits: Sequence[str], validation_splits: Sequence[str]
) -> Corpus:
    dataset = open_dataset(source).require_complete()
    if dataset.kind not in ("features", "manifest"):
        raise DatasetError(f"{dataset.folder.uri}: expected a dataset of kind features or manifest, got {dataset.kind}")
    next(read_captions(dataset, validation_splits))  # fails now rather than after the first epoch
    return Corpus(
        dataset.fingerprint,
        lambda: read_captions(dataset, train_splits),
        lambda: read_captions(dataset, validation_splits),
    )


def _open_sentences(location: Location, validation_fraction: float) -> Corpus:
    """Holds out lines evenly through the file, so that both parts are of all that it is about."""

    def read(wanted: bool) -> Iterator[str]:
        lines = (line for line in map(_strip_end, read_lines(location)) if line.strip())
        for number, line in enumerate(lines, 1):
            if (int(number * validation_fraction) > int((number - 1) * validation_fraction)) == wanted:
                yield line

    return Corpus(_hash_text(location), lambda: read(False), lambda: read(True))


def _open_continuous(location: Location, validation_fraction: float) -> Corpus:
    def read() -> str:
        return "".join(_strip_end(line) + "\n" for line in read_lines(location))

    def training() -> Iterator[str]:
        text = read()
        yield text[: len(text) - int(len(text) * validation_fraction)]

    def testing() -> Iterator[str]:
        text = read()
        yield text[len(text) - int(len(text) * validation_fraction) :]

    return Corpus(_hash_text(location), training, testing)


def _strip_end(line: str) -> str:
    return line.rstrip("\r\n")


def _hash_text(location: Location) -> str:
    digest = hashlib.sha256()
    for line in read_lines(location):
        digest.update(line.encode())
    return digest.hexdigest()
