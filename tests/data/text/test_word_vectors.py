import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captionlib.data.text.word_vectors import read_word_vectors
from captionlib.errors import ConfigError, DatasetError

Table = dict[str, list[float]]
VECTORS: Table = {
    "dog": [0.5, -1.25, 3.0],
    "New_York": [1.0, 2.0, -3.0],
    "A": [7.0, 8.0, 9.0],
    "café": [0.0, 1e-5, 1.0],
}


def glove(table: Table) -> bytes:
    return "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in table.items()).encode()


def word2vec_text(table: Table) -> bytes:
    return f"{len(table)} 3\n".encode() + glove(table)


def fasttext(table: Table) -> bytes:
    """fastText ends each line with a space."""
    return word2vec_text(table).replace(b"\n", b" \n").replace(b" \n", b"\n", 1)


def word2vec_binary(table: Table) -> bytes:
    """As word2vec.c writes it: a line break after each vector."""
    records = [f"{word} ".encode() + np.array(vector, "<f4").tobytes() + b"\n" for word, vector in table.items()]
    return f"{len(table)} 3\n".encode() + b"".join(records)


def word2vec_binary_without_breaks(table: Table) -> bytes:
    """As the vectors of Google News are."""
    records = [f"{word} ".encode() + np.array(vector, "<f4").tobytes() for word, vector in table.items()]
    return f"{len(table)} 3\n".encode() + b"".join(records)


FORMATS = [glove, word2vec_text, fasttext, word2vec_binary, word2vec_binary_without_breaks]


@pytest.fixture(params=FORMATS)
def write(request: pytest.FixtureRequest) -> Callable[[Table], bytes]:
    written: Callable[[Table], bytes] = request.param
    return written


def test_every_format_gives_the_same_vectors_and_says_what_is_missing(
    tmp_path: Path, write: Callable[[Table], bytes]
) -> None:
    path = tmp_path / "vectors"
    path.write_bytes(write(VECTORS))
    read = read_word_vectors(str(path), ["dog", "zebra", "café", "cat"], 3)
    assert set(read.vectors) == {"dog", "café"}
    np.testing.assert_array_equal(read.vectors["dog"], np.array(VECTORS["dog"], np.float32))
    np.testing.assert_array_equal(read.vectors["café"], np.array(VECTORS["café"], np.float32))
    assert read.missing == ("zebra", "cat")


@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=1),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
    )
)
def test_binary_and_text_hold_the_same(tmp_path_factory: pytest.TempPathFactory, table: Table) -> None:
    folder = tmp_path_factory.mktemp("vectors")
    for number, form in enumerate(FORMATS):
        path = folder / str(number)
        path.write_bytes(form(table))
        read = read_word_vectors(str(path), list(table), 3)
        assert read.missing == ()
        for word, vector in table.items():
            np.testing.assert_array_equal(read.vectors[word], np.array(vector, np.float32))


def test_another_case_will_do_where_the_word_itself_is_missing(tmp_path: Path, write: Callable[[Table], bytes]) -> None:
    (tmp_path / "vectors").write_bytes(write({"DOG": [0.0, 0.0, 1.0], **VECTORS}))
    read = read_word_vectors(str(tmp_path / "vectors"), ["a", "dog"], 3)
    assert read.vectors["a"].tolist() == VECTORS["A"]
    assert read.vectors["dog"].tolist() == VECTORS["dog"]


def test_words_with_spaces_are_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "vectors").write_bytes(glove({"the": [1, 2, 3], "at name@domain": [4, 5, 6], "at": [7, 8, 9]}))
    assert read_word_vectors(str(tmp_path / "vectors"), ["at"], 3).vectors["at"].tolist() == [7, 8, 9]


def test_a_packed_file_is_unpacked(tmp_path: Path, write: Callable[[Table], bytes]) -> None:
    (tmp_path / "vectors.gz").write_bytes(gzip.compress(write(VECTORS)))
    assert set(read_word_vectors(str(tmp_path / "vectors.gz"), ["dog"], 3).vectors) == {"dog"}


def test_vectors_of_another_size_are_refused_with_the_size_to_set(
    tmp_path: Path, write: Callable[[Table], bytes]
) -> None:
    (tmp_path / "vectors").write_bytes(write(VECTORS))
    with pytest.raises(
        ConfigError, match=r"have 3 numbers, the captioner's word vectors 512; set captioner.embedding_size=3"
    ):
        read_word_vectors(str(tmp_path / "vectors"), ["dog"], 512)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_word_vectors(str(tmp_path / "none.txt"), ["dog"], 3)


@pytest.mark.parametrize("content", [b"", b"once upon a time\n", b"once upon\n"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tale.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=r"in the first line|a first line of two counts"):
        read_word_vectors(str(tmp_path / "tale.txt"), ["dog"], 3)


@pytest.mark.parametrize("line", ["dog 1.0 2.0", "dog 1.0 x 2.0", "dog 1.0 nan 2.0"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "vectors").write_text(f"cat 1 2 3\n{line}\n")
    with pytest.raises(DatasetError, match="line 2: expected a word and 3 numbers, got"):
        read_word_vectors(str(tmp_path / "vectors"), ["dog"], 3)


def test_a_binary_file_that_ends_too_soon_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vectors").write_bytes(word2vec_binary_without_breaks(VECTORS)[:-2])
    with pytest.raises(DatasetError, match="expected 4 words, the file ends after 3"):
        read_word_vectors(str(tmp_path / "vectors"), ["dog"], 3)


def test_vectors_of_another_language_are_refused(tmp_path: Path, write: Callable[[Table], bytes]) -> None:
    (tmp_path / "vectors").write_bytes(write(VECTORS))
    with pytest.raises(DatasetError, match="expected some of the 2 words of the vocabulary, got none"):
        read_word_vectors(str(tmp_path / "vectors"), ["hond", "kat"], 3)
