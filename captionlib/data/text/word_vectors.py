"""Reads pretrained word vectors in the formats of word2vec (text and binary), GloVe and fastText.

| format | content |
|---|---|
| word2vec text, fastText `.vec` | a line `count size`, then one line per word: the word and `size` values |
| GloVe | the same without the first line |
| word2vec binary | a line `count size`, then per word: the word, a space, and `size` little-endian float32 values |

The format is detected from the first lines. Files are streamed, and only the requested vectors are kept in memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError, DatasetError
from captionlib.storage.file_systems import open_decompressed, open_file_system

__all__ = ["WordVectors", "read_word_vectors"]

_MAX_LINE_BYTES = 1 << 20  # limit for binary files, which may contain no line breaks

_Entry = tuple[str, npt.NDArray[np.float32]]


class WordVectors(NamedTuple):
    """Word vectors that were read from a file."""

    vectors: Mapping[str, npt.NDArray[np.float32]]  # `[size]` each
    missing: tuple[str, ...]  # requested words without a vector, in the requested order


def read_word_vectors(uri: str, words: Sequence[str], size: int) -> WordVectors:
    """Reads the vectors of `words` from a file, which may be compressed (.gz, .bz2 or .xz).

    If the file has no lowercase entry for a word, the first entry that differs only in case is used. Files are sorted
    by frequency, so this is the most frequent spelling. For example, the Google News vectors contain `A` but not `a`.

    Args:
        uri: path or URL of the file.
        words: words in lower case.
        size: expected number of values per vector.

    Raises:
        ConfigError: the file cannot be read, or its vectors do not have `size` values.
        DatasetError: the file is damaged, has a different format, or contains none of the words.
    """
    requested = frozenset(words)
    exact: dict[str, npt.NDArray[np.float32]] = {}
    other_case: dict[str, npt.NDArray[np.float32]] = {}
    try:
        with open_decompressed(*open_file_system(uri)) as file:
            for word, vector in _read_entries(file, uri, requested, size):
                if word in requested:
                    exact.setdefault(word, vector)
                else:
                    other_case.setdefault(word.lower(), vector)
    except (OSError, EOFError) as error:
        raise ConfigError(f"word vectors {uri} cannot be read: {error}") from error
    available = {**other_case, **exact}
    vectors = {word: available[word] for word in words if word in available}
    if words and not vectors:
        raise DatasetError(
            f"word vectors {uri}: expected some of the {len(requested)} words of the vocabulary, got none; "
            "use vectors for the language of the captions"
        )
    return WordVectors(vectors, tuple(word for word in words if word not in vectors))


def _read_entries(file: BinaryIO, uri: str, requested: frozenset[str], size: int) -> Iterator[_Entry]:
    """Yields the requested words in a file, ignoring case, with their vectors."""
    first = file.readline(_MAX_LINE_BYTES)
    header = first.split()
    has_counts = len(header) == 2 and all(field.isdigit() for field in header)
    if not has_counts and (len(header) < 3 or not _are_finite_numbers(header[1:])):
        raise DatasetError(
            f"word vectors {uri}: expected the number and size of vectors, or a word and its vector, in the "
            f"first line, got {first[:80]!r}; use a file in the format of word2vec, GloVe or fastText"
        )
    actual_size = int(header[1]) if has_counts else len(header) - 1
    if actual_size != size:
        raise ConfigError(
            f"word vectors {uri}: expected vectors of the captioner's embedding size {size}, got size {actual_size}; "
            f"set captioner.embedding_size={actual_size}, or use different vectors"
        )
    if not has_counts:
        yield from _read_text(chain([first], file), uri, requested, size, 1)
        return
    second = file.readline(_MAX_LINE_BYTES)
    fields = second.split()
    if len(fields) > size and _are_finite_numbers(fields[-size:]):
        yield from _read_text(chain([second], file), uri, requested, size, 2)
    else:
        yield from _read_binary(file, second, uri, requested, size, int(header[0]))


def _are_finite_numbers(fields: Sequence[bytes]) -> bool:
    try:
        return all(math.isfinite(float(field)) for field in fields)
    except ValueError:
        return False


def _read_text(
    lines: Iterable[bytes], uri: str, requested: frozenset[str], size: int, first_number: int
) -> Iterator[_Entry]:
    for number, line in enumerate(lines, start=first_number):
        if _decode(line.split(b" ", 1)[0]).lower() not in requested:
            continue
        word, *values = line.rstrip().rsplit(b" ", size)  # from the right, since some GloVe words contain spaces
        if len(values) != size or not _are_finite_numbers(values):
            raise DatasetError(
                f"word vectors {uri}, line {number}: expected a word and {size} numbers, got {line[:80]!r}; "
                "download the file again"
            )
        if _decode(word).lower() in requested:
            yield _decode(word), np.array([float(value) for value in values], np.float32)


def _read_binary(
    file: BinaryIO, start: bytes, uri: str, requested: frozenset[str], size: int, count: int
) -> Iterator[_Entry]:
    """Yields the requested entries. `start` contains the bytes that were already read after the first line."""
    buffer, position = start, 0
    for number in range(count):
        space = buffer.find(b" ", position)
        while space < 0 or len(buffer) < space + 1 + 4 * size:
            chunk = file.read(1 << 20)
            if not chunk:
                raise DatasetError(
                    f"word vectors {uri}: expected {count} words, got only {number}; download the file again"
                )
            buffer, position = buffer[position:] + chunk, 0
            space = buffer.find(b" ")
        word = _decode(buffer[position:space].lstrip())
        position = space + 1 + 4 * size
        if word.lower() in requested:
            vector = np.frombuffer(buffer, "<f4", size, space + 1).astype(np.float32)
            if not np.isfinite(vector).all():
                raise DatasetError(
                    f"word vectors {uri}: expected finite values for {word!r}, got NaN or infinity; "
                    "download the file again"
                )
            yield word, vector


def _decode(word: bytes) -> str:
    return word.decode("utf-8", errors="replace")
