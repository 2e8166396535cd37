import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.data.text.corpora import open_corpus
from captionlib.errors import ConfigError, DatasetError

LINES = [f"sentence {number}" for number in range(100)]


def test_sentences_are_lines_and_validation_takes_evenly_spaced_ones(tmp_path: Path) -> None:
    path = tmp_path / "sentences.txt"
    path.write_text("\r\n".join(["", *LINES, "  "]), encoding="utf-8", newline="")
    corpus = open_corpus(path, validation_fraction=0.1)
    assert list(corpus.read_validation()) == LINES[9::10]
    assert sorted([*corpus.read_training(), *corpus.read_validation()]) == sorted(LINES)


def test_continuous_text_is_one_text_whose_end_is_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "author.txt"
    path.write_text("To be,\r\nor not\r\n\r\nto be." * 10, encoding="utf-8", newline="")
    corpus = open_corpus(path, "continuous", validation_fraction=0.25)
    (training,), (validation,) = corpus.read_training(), corpus.read_validation()
    assert training + validation == "To be,\nor not\n\nto be." * 10 + "\n"
    assert len(validation) == (len(training) + len(validation)) // 4


def test_fingerprint_identifies_the_text_whatever_its_compression(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("\n".join(LINES))
    (tmp_path / "compressed.txt.gz").write_bytes(gzip.compress("\n".join(LINES).encode()))
    (tmp_path / "other.txt").write_text("\n".join(LINES[1:]))
    plain, compressed, other = (
        open_corpus(tmp_path / name) for name in ("plain.txt", "compressed.txt.gz", "other.txt")
    )
    assert list(compressed.read_training()) == list(plain.read_training())
    assert compressed.fingerprint == plain.fingerprint != other.fingerprint


def test_dataset_yields_the_captions_of_its_splits(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    rows = [
        {"image_id": f"{number}", "uri": "", "split": split, "captions": [f"{split} {number}", f"again {number}"]}
        for number, split in enumerate(["train", "val", "test", "restval"])
    ]
    with write_shard(dataset, 0, 4) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
    with pytest.raises(DatasetError, match="complete"):
        open_corpus(tmp_path / "manifest")
    dataset.finish()
    corpus = open_corpus(tmp_path / "manifest")
    assert list(corpus.read_training()) == ["train 0", "again 0", "restval 3", "again 3"]
    assert list(corpus.read_validation()) == ["val 1", "again 1"]
    assert corpus.fingerprint == dataset.compute_content_checksum()
    with pytest.raises(DatasetError, match="expected captions in split other, got none"):
        open_corpus(tmp_path / "manifest", validation_splits=["other"])
    with pytest.raises(ConfigError, match="layout=continuous expects a text file"):
        open_corpus(tmp_path / "manifest", "continuous")


@pytest.mark.parametrize("layout", ["sentences", "continuous"])
def test_file_without_enough_text_is_an_error(tmp_path: Path, layout: str) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DatasetError, match=r"empty\.txt: expected text for training, got none"):
        open_corpus(tmp_path / "empty.txt", layout)  # type: ignore[arg-type]
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    with pytest.raises(DatasetError, match=r"expected text for validation, got none at validation_fraction=0\.05"):
        open_corpus(tmp_path / "short.txt", layout)  # type: ignore[arg-type]


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        open_corpus(tmp_path / "nothing.txt")
