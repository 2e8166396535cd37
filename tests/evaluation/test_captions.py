import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionlib.data.datasets import create_dataset
from captionlib.data.schemas import MANIFEST, captions_schema
from captionlib.data.shard_writer import write_shard
from captionlib.data.shards import ShardedDataset
from captionlib.errors import DatasetError
from captionlib.evaluation.captions import read_captions_and_references, score_captions

CAPTIONS = {
    "10": "a dog runs on the grass",
    "9": "two men on a beach",
    "b": "a dog's ball",
    "empty": "",
}
REFERENCES = {
    "9": ["Two men walk on the beach.", "Men on a beach, talking"],
    "10": ["A dog runs across the green grass!", "The dog is running on grass", "dog"],
    "b": ["The ball of a dog", "A dog's ball."],
    "empty": ["A cat sleeps"],
    "never captioned": ["A horse"],
}


def write(folder: Path, kind: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> ShardedDataset:
    dataset = create_dataset(folder, kind, schema, config={}, shards=1)
    with write_shard(dataset, 0, len(rows)) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=schema))
    dataset.finish()
    return dataset


def write_captions(folder: Path, captions: dict[str, str], split: str = "val") -> ShardedDataset:
    rows = [
        {"image_id": i, "uri": i, "split": split, "caption": text, "log_prob": -1.0, "tokens": 1, "candidates": []}
        for i, text in captions.items()
    ]
    return write(folder, "captions", captions_schema(), rows)


def write_manifest(folder: Path, references: dict[str, list[str]]) -> ShardedDataset:
    rows = [{"image_id": i, "uri": i, "split": "val", "captions": texts} for i, texts in references.items()]
    return write(folder, "manifest", MANIFEST, rows)


def test_the_scores_are_pycocoevalcaps_own() -> None:
    result = score_captions(CAPTIONS, REFERENCES)
    tokenizer = PTBTokenizer()
    ids = sorted(CAPTIONS)
    said = tokenizer.tokenize({i: [{"caption": CAPTIONS[i]}] for i in ids})
    expected = tokenizer.tokenize({i: [{"caption": text} for text in REFERENCES[i]] for i in ids})
    bleu, bleu_of_images = Bleu(4).compute_score(expected, said, verbose=0)
    cider, cider_of_images = Cider().compute_score(expected, said)
    assert result.images == 4
    assert list(result.scores.values()) == pytest.approx([*bleu, cider], abs=1e-12)
    assert list(result.of_images["BLEU-2"].values()) == pytest.approx(bleu_of_images[1], abs=1e-12)
    assert [result.of_images["CIDEr"][i] for i in ids] == pytest.approx(list(cider_of_images), abs=1e-12)


def test_the_scores_of_one_sentence_by_hand() -> None:
    result = score_captions({"x": "a dog runs"}, {"x": ["A dog sleeps here."]})
    shorter = math.exp(1 - 4 / 3)  # 3 words said, 4 expected
    assert result.scores["BLEU-1"] == pytest.approx(2 / 3 * shorter, abs=1e-6)
    assert result.scores["BLEU-2"] == pytest.approx(math.sqrt(2 / 3 * 1 / 2) * shorter, abs=1e-6)
    assert result.scores["CIDEr"] == 0


def test_the_order_of_the_images_changes_nothing() -> None:
    backwards = dict(reversed(CAPTIONS.items()))
    assert score_captions(backwards, REFERENCES) == score_captions(CAPTIONS, REFERENCES)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    score_captions(CAPTIONS, REFERENCES)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("references", [{}, {"x": []}])
def test_a_caption_without_references_is_named(references: dict[str, list[str]]) -> None:
    with pytest.raises(DatasetError, match="1 of 2 captions have no reference sentences, the first is image x"):
        score_captions({"x": "a dog", "b": "a ball"}, {**REFERENCES, **references})


def test_references_without_any_word_are_refused_if_all_are_so() -> None:
    with pytest.raises(DatasetError, match="references of 1 captions have no words"):
        score_captions({"x": "a dog"}, {"x": ["...", " "]})
    assert score_captions({**CAPTIONS, "x": "a dog"}, {**REFERENCES, "x": ["..."]}).of_images["CIDEr"]["x"] == 0


def test_no_captions_are_no_score() -> None:
    with pytest.raises(DatasetError, match="at least one caption"):
        score_captions({}, REFERENCES)


def test_captions_are_read_with_their_references(tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "captions", CAPTIONS)
    manifest = write_manifest(tmp_path / "manifest", REFERENCES)
    said, references = read_captions_and_references(captions, manifest, ["val", "test"])
    assert said == CAPTIONS
    assert references == {i: texts for i, texts in REFERENCES.items() if i in CAPTIONS}
    assert read_captions_and_references(captions, manifest) == (said, references)


def test_a_split_without_captions_is_answered_with_the_splits_there_are(tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "captions", CAPTIONS)
    manifest = write_manifest(tmp_path / "manifest", REFERENCES)
    with pytest.raises(DatasetError, match="no captions in split test; its splits are val"):
        read_captions_and_references(captions, manifest, ["test"])
