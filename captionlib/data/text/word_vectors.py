"""Word vectors that others have trained, from the files of word2vec (text and binary), GloVe and fastText.

| file | looks like |
|---|---|
| word2vec text, fastText `.vec` | a line `count size`, then a line a word: the word and `size` numbers |
| GloVe | the same without the first line |
| word2vec binary | the line `count size`, then each word, a space, and `size` float32, little-endian |

Which of them a file is, its first bytes tell. It is streamed, and only the vectors that are asked for are kept.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError, DatasetError
from captionlib.storage.file_systems import open_file_system, open_unpacked

__all__ = ["WordVectors", "read_word_vectors"]

_LONGEST_LINE = 1 << 20  # bytes; binary vectors may have no line break for long

_Entry = tuple[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class WordVectors:
    """The vectors of some words.

    Attributes:
        vectors: by word, `[size] float32`.
        missing: words that were asked for and have none, in the order asked for.
    """

    vectors: Mapping[str, npt.NDArray[np.float32]]
    missing: tuple[str, ...]


def read_word_vectors(uri: str, words: Sequence[str], size: int) -> WordVectors:
    """Reads the vectors of these words; `.gz`, `.bz2` and `.xz` are unpacked on the way.

    A word that the file has only in another case, as word2vec's news vectors have `A` but not `a`, gets the vector of
    the first such spelling; files have the frequent ones first.

    Args:
        uri: the file's path or address.
        words: whose vectors, in lower case.
        size: numbers in a vector.

    Raises:
        ConfigError: the file cannot be read, or has vectors of another size.
        DatasetError: the file is damaged, or of no such kind, or has none of the words.
    """
    wanted = frozenset(words)
    exact: dict[str, npt.NDArray[np.float32]] = {}
    spelt_otherwise: dict[str, npt.NDArray[np.float32]] = {}
    try:
        with open_unpacked(*open_file_system(uri)) as file:
            for word, vector in _read(file, uri, wanted, size):
                if word in wanted:
                    exact.setdefault(word, vector)
                else:
                    spelt_otherwise.setdefault(word.lower(), vector)
    except (OSError, EOFError) as error:
        raise ConfigError(f"word vectors {uri} cannot be read: {error}") from error
    both = {**spelt_otherwise, **exact}
    found = {word: both[word] for word in words if word in both}
    if words and not found:
        raise DatasetError(
            f"word vectors {uri}: expected some of the {len(wanted)} words of the vocabulary, got none; "
            "give vectors of the captions' language"
        )
    return WordVectors(found, tuple(word for word in words if word not in found))


def _read(file: BinaryIO, uri: str, wanted: frozenset[str], size: int) -> Iterator[_Entry]:
    """The words of a file that are wanted, in whatever case, with their vectors."""
    first = file.readline(_LONGEST_LINE)
    header = first.split()
    if len(header) != 2:
        given = len(header) - 1
        if given < 1 or not _are_numbers(header[1:]):
            raise DatasetError(
                f"word vectors {uri}: expected a first line of two counts, or of a word and its vector, "
                f"got {first[:80]!r}; give a file of word2vec, GloVe or fastText"
            )
        _require_size(uri, given, size)
        yield from _read_text(chain([first], file), uri, wanted, size, 1)
        return
    try:
        count, given = map(int, header)
    except ValueError as error:
        raise DatasetError(f"word vectors {uri}: expected two counts in the first line, got {first[:80]!r}") from error
    _require_size(uri, given, size)
    second = file.readline(_LONGEST_LINE)
    fields = second.split()
    if len(fields) > size and _are_numbers(fields[-size:]):
        yield from _read_text(chain([second], file), uri, wanted, size, 2)
    else:
        yield from _read_binary(file, second, uri, wanted, size, count)


def _require_size(uri: str, given: int, size: int) -> None:
    if given != size:
        raise ConfigError(
            f"word vectors {uri} have {given} numbers, the captioner's word vectors {size}; "
            f"set captioner.embedding_size={given}, or give other vectors"
        )


def _are_numbers(fields: Sequence[bytes]) -> bool:
    try:
        return all(math.isfinite(float(field)) for field in fields)
    except ValueError:
        return False


def _read_text(
    lines: Iterable[bytes], uri: str, wanted: frozenset[str], size: int, first_number: int
) -> Iterator[_Entry]:
    for number, line in enumerate(lines, start=first_number):
        if _decode(line.split(b" ", 1)[0]).lower() not in wanted:
            continue
        word, *numbers = line.rstrip().rsplit(b" ", size)  # from the right: some of GloVe's words have spaces
        if len(numbers) != size or not _are_numbers(numbers):
            raise DatasetError(
                f"word vectors {uri}, line {number}: expected a word and {size} numbers, got {line[:80]!r}; "
                "get the file again"
            )
        if _decode(word).lower() in wanted:
            yield _decode(word), np.array([float(text) for text in numbers], np.float32)


def _read_binary(
    file: BinaryIO, begun: bytes, uri: str, wanted: frozenset[str], size: int, count: int
) -> Iterator[_Entry]:
    """Entries from `begun` on, which has been read of the file already."""
    buffer, position = begun, 0
    for number in range(count):
        space = buffer.find(b" ", position)
        while space < 0 or len(buffer) < space + 1 + 4 * size:
            chunk = file.read(1 << 20)
            if not chunk:
                raise DatasetError(
                    f"word vectors {uri}: expected {count} words, the file ends after {number}; get it again"
                )
            buffer, position = buffer[position:] + chunk, 0
            space = buffer.find(b" ")
        word = _decode(buffer[position:space].lstrip())
        position = space + 1 + 4 * size
        if word.lower() in wanted:
            vector = np.frombuffer(buffer, "<f4", size, space + 1).astype(np.float32)
            if not np.isfinite(vector).all():
                raise DatasetError(f"word vectors {uri}: expected numbers for {word!r}, got others; get the file again")
            yield word, vector


def _decode(word: bytes) -> str:
    return word.decode("utf-8", errors="replace")
