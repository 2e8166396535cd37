import errno
from pathlib import Path

import numpy as np
import pytest

from captionlib.errors import StorageError
from captionlib.search import text_index
from captionlib.search.config import IndexConfig, VectorLayout
from captionlib.search.index_folder import temporary_folder
from captionlib.search.vector_index import merge_indexes, write_partial_index, write_trained_index
from captionlib.storage.folders import Folder

FULL = Path("/dev/full")  # every write fails as on a full disk
VECTORS = np.eye(4, dtype=np.float32)


def test_vectors_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    layout = VectorLayout.choose(IndexConfig(vectors="flat"), 4, 4)
    with pytest.raises(OSError, match="No space left") as raised:
        write_trained_index(layout, VECTORS, FULL)
    assert raised.value.errno == errno.ENOSPC
    write_trained_index(layout, VECTORS, tmp_path / "trained")
    with pytest.raises(OSError, match="No space left"):
        write_partial_index(tmp_path / "trained", np.arange(4), VECTORS, FULL)
    with pytest.raises(OSError, match="No space left"):
        merge_indexes(tmp_path / "trained", [], [], FULL)
    write_partial_index(tmp_path / "trained", np.arange(4), VECTORS, tmp_path / "part")
    assert merge_indexes(tmp_path / "trained", [], [tmp_path / "part"], tmp_path / "merged") == 4


def test_full_disk_during_a_build_names_the_index(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="index cannot be accessed: No space left on device"),
        temporary_folder(Folder(tmp_path / "index")),
    ):
        FULL.write_bytes(b"x")


def test_text_index_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("An IO error occurred: 'No space left on device (os error 28)'")

    monkeypatch.setattr(text_index, "_write_text_index", fail)
    with pytest.raises(StorageError, match="text cannot be written: An IO error occurred: 'No space left"):
        text_index.write_text_index(tmp_path / "text", "en", [])
