import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from captionlib.data.text.word_vectors import read_word_vectors
from captionlib.errors import ConfigError, DatasetError

Table = dict[str, list[float]]
VECTORS: Table = {
    "dog": [0.5, -1.25, 3.0],
    "New_York": [1.0, 2.0, -3.0],
    "A": [7.0, 8.0, 9.0],
    "café": [0.0, 1e-5, 1.0],
}


def encode_glove(table: Table) -> bytes:
    return "".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in table.items()).encode()


def encode_word2vec_text(table: Table) -> bytes:
    return f"{len(table)} 3\n".encode() + encode_glove(table)


def encode_fasttext(table: Table) -> bytes:
    """Ends each line with a space, as fastText does."""
    return encode_word2vec_text(table).replace(b"\n", b" \n").replace(b" \n", b"\n", 1)


def encode_word2vec_binary(table: Table) -> bytes:
    """Writes a line break after each vector, as word2vec.c does."""
    records = [f"{word} ".encode() + np.array(vector, "<f4").tobytes() + b"\n" for word, vector in table.items()]
    return f"{len(table)} 3\n".encode() + b"".join(records)


def encode_word2vec_binary_without_breaks(table: Table) -> bytes:
    """Writes no line breaks, as in the Google News vectors."""
    records = [f"{word} ".encode() + np.array(vector, "<f4").tobytes() for word, vector in table.items()]
    return f"{len(table)} 3\n".encode() + b"".join(records)


FORMATS = [
    encode_glove,
    encode_word2vec_text,
    encode_fasttext,
    encode_word2vec_binary,
    encode_word2vec_binary_without_breaks,
]


@pytest.fixture(params=FORMATS)
def encode(request: pytest.FixtureRequest) -> Callable[[Table], bytes]:
    function: Callable[[Table], bytes] = request.param
    return function


def test_every_format_yields_the_same_vectors_and_missing_words(
    tmp_path: Path, encode: Callable[[Table], bytes]
) -> None:
    path = tmp_path / "vectors"
    path.write_bytes(encode(VECTORS))
    result = read_word_vectors(str(path), ["dog", "zebra", "café", "cat"], 3)
    assert set(result.vectors) == {"dog", "café"}
    np.testing.assert_array_equal(result.vectors["dog"], np.array(VECTORS["dog"], np.float32))
    np.testing.assert_array_equal(result.vectors["café"], np.array(VECTORS["café"], np.float32))
    assert result.missing == ("zebra", "cat")


@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=1),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
    )
)
def test_formats_round_trip(tmp_path_factory: pytest.TempPathFactory, table: Table) -> None:
    folder = tmp_path_factory.mktemp("vectors")
    for number, encode in enumerate(FORMATS):
        path = folder / str(number)
        path.write_bytes(encode(table))
        result = read_word_vectors(str(path), list(table), 3)
        assert result.missing == ()
        for word, vector in table.items():
            np.testing.assert_array_equal(result.vectors[word], np.array(vector, np.float32))


def test_another_case_substitutes_for_a_missing_word(tmp_path: Path, encode: Callable[[Table], bytes]) -> None:
    (tmp_path / "vectors").write_bytes(encode({"DOG": [0.0, 0.0, 1.0], **VECTORS}))
    result = read_word_vectors(str(tmp_path / "vectors"), ["a", "dog"], 3)
    assert result.vectors["a"].tolist() == VECTORS["A"]
    assert result.vectors["dog"].tolist() == VECTORS["dog"]


def test_words_with_spaces_do_not_match_their_first_part(tmp_path: Path) -> None:
    (tmp_path / "vectors").write_bytes(encode_glove({"the": [1, 2, 3], "at name@domain": [4, 5, 6], "at": [7, 8, 9]}))
    assert read_word_vectors(str(tmp_path / "vectors"), ["at"], 3).vectors["at"].tolist() == [7, 8, 9]


def test_compressed_file_is_read(tmp_path: Path, encode: Callable[[Table], bytes]) -> None:
    (tmp_path / "vectors.gz").write_bytes(gzip.compress(encode(VECTORS)))
    assert set(read_word_vectors(str(tmp_path / "vectors.gz"), ["dog"], 3).vectors) == {"dog"}


def test_other_size_is_an_error_naming_the_size_to_set(tmp_path: Path, encode: Callable[[Table], bytes]) -> None:
    (tmp_path / "vectors").write_bytes(encode(VECTORS))
    with pytest.raises(ConfigError, match=r"embedding size 512, got size 3; set captioner.embedding_size=3"):
        read_word_vectors(str(tmp_path / "vectors"), ["dog"], 512)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_word_vectors(str(tmp_path / "none.txt"), ["dog"], 3)


@pytest.mark.parametrize("content", [b"", b"once upon a time\n", b"once upon\n"])
def test_file_of_another_format_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tale.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=r"expected the number and size of vectors.* in the first line, got b'"):
        read_word_vectors(str(tmp_path / "tale.txt"), ["dog"], 3)


@pytest.mark.parametrize("line", ["dog 1.0 2.0", "dog 1.0 x 2.0", "dog 1.0 nan 2.0"])
def test_damaged_line_is_an_error_naming_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "vectors").write_text(f"cat 1 2 3\n{line}\n")
    with pytest.raises(DatasetError, match="line 2: expected a word and 3 numbers, got"):
        read_word_vectors(str(tmp_path / "vectors"), ["dog"], 3)


def test_truncated_binary_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "vectors").write_bytes(encode_word2vec_binary_without_breaks(VECTORS)[:-2])
    with pytest.raises(DatasetError, match="expected 4 words, got only 3"):
        read_word_vectors(str(tmp_path / "vectors"), ["dog"], 3)


def test_vectors_without_any_requested_word_are_an_error(tmp_path: Path, encode: Callable[[Table], bytes]) -> None:
    (tmp_path / "vectors").write_bytes(encode(VECTORS))
    with pytest.raises(DatasetError, match="expected some of the 2 words of the vocabulary, got none"):
        read_word_vectors(str(tmp_path / "vectors"), ["hond", "kat"], 3)
