import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError
from captionlib.evaluation.bootstrap import BootstrapConfig
from captionlib.evaluation.caption_scores import CaptionScores, score_captions, scores_table

CAPTIONS = {  # in the order of their ids, as evaluations go
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
    return write(folder, "manifest", MANIFEST_SCHEMA, rows)


@lru_cache(maxsize=1)
def scores() -> CaptionScores:
    """Of CAPTIONS; METEOR's program takes seconds to start, so it is started once for all who compare with them."""
    return score_captions(CAPTIONS, REFERENCES)


def test_the_scores_are_pycocoevalcaps_own() -> None:
    result = scores()
    tokenizer = PTBTokenizer()
    said = tokenizer.tokenize({i: [{"caption": CAPTIONS[i]}] for i in CAPTIONS})
    expected = tokenizer.tokenize({i: [{"caption": text} for text in REFERENCES[i]] for i in CAPTIONS})
    bleu, bleu_of_images = Bleu(4).compute_score(expected, said, verbose=0)
    meteor, meteor_of_images = Meteor().compute_score(expected, said)
    rouge, rouge_of_images = Rouge().compute_score(expected, said)
    cider, cider_of_images = Cider().compute_score(expected, said)
    assert (result.images, result.tokenizer) == (4, "ptb")
    assert list(result.scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert list(result.scores.values()) == pytest.approx([*bleu, meteor, rouge, cider], abs=1e-12)
    of_images = [*bleu_of_images, meteor_of_images, rouge_of_images, cider_of_images]
    for name, own in zip(result.scores, of_images, strict=True):
        assert list(result.of_images[name].values()) == pytest.approx(list(own), abs=1e-12), name


def test_the_scores_of_one_sentence_by_hand() -> None:
    result = score_captions({"x": "a dog runs"}, {"x": ["A dog sleeps here."]})
    shorter = math.exp(1 - 4 / 3)  # 3 words said, 4 expected
    assert result.scores["BLEU-1"] == pytest.approx(2 / 3 * shorter, abs=1e-6)
    assert result.scores["BLEU-2"] == pytest.approx(math.sqrt(2 / 3 * 1 / 2) * shorter, abs=1e-6)
    assert result.scores["CIDEr"] == 0


def test_the_order_of_the_images_changes_nothing_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    expected = scores().scores
    capfd.readouterr()
    backwards = dict(reversed(CAPTIONS.items()))
    assert score_captions(backwards, REFERENCES).scores == pytest.approx(expected, abs=1e-12)
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


def test_without_java_what_needs_none_is_told_by_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    with_java = scores()
    monkeypatch.setenv("PATH", "")
    result = score_captions(CAPTIONS, REFERENCES)
    assert result.tokenizer == "captionlib"
    assert list(result.scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert result.scores == pytest.approx({name: with_java.scores[name] for name in result.scores}, abs=1e-9)


def test_every_score_lies_within_its_interval() -> None:
    result = scores()
    assert result.intervals.keys() == result.scores.keys()
    for name, (low, high) in result.intervals.items():
        assert 0 <= low <= result.scores[name] <= high


def test_intervals_repeat_and_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without METEOR, whose program takes seconds to start

    def score(samples: int) -> CaptionScores:
        return score_captions(CAPTIONS, REFERENCES, bootstrap=BootstrapConfig(samples=samples))

    assert len(score(200).intervals) == 6
    assert score(200) == score(200)
    assert score(200).intervals != score(20).intervals
    assert score(0).intervals == {}


def test_the_scores_of_images_become_a_table() -> None:
    result = scores()
    table = scores_table(result, CAPTIONS)
    assert table.column_names == [
        *("image_id", "caption", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
    ]
    assert table["image_id"].to_pylist() == list(CAPTIONS)
    assert table["cider"].to_pylist() == list(result.of_images["CIDEr"].values())
