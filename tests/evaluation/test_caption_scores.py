import math
import shutil
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
from captionlib.evaluation.bootstrap import BootstrapConfig, Scores
from captionlib.evaluation.caption_scores import CiderScorer, build_scores_table, score_captions

CAPTIONS = {  # sorted by id, as evaluations are
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
def scores() -> Scores:
    """Scores CAPTIONS once for all tests, because METEOR takes seconds to start."""
    return score_captions(CAPTIONS, REFERENCES)


def test_scores_equal_those_of_pycocoevalcap() -> None:
    result = scores()
    tokenizer = PTBTokenizer()
    hypotheses = tokenizer.tokenize({i: [{"caption": CAPTIONS[i]}] for i in CAPTIONS})
    expected = tokenizer.tokenize({i: [{"caption": text} for text in REFERENCES[i]] for i in CAPTIONS})
    bleu, bleu_per_image = Bleu(4).compute_score(expected, hypotheses, verbose=0)
    meteor, meteor_per_image = Meteor().compute_score(expected, hypotheses)
    rouge, rouge_per_image = Rouge().compute_score(expected, hypotheses)
    cider, cider_per_image = Cider().compute_score(expected, hypotheses)
    assert list(result.per_image["CIDEr"]) == list(CAPTIONS)
    assert list(result.overall) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert list(result.overall.values()) == pytest.approx([*bleu, meteor, rouge, cider], abs=1e-12)
    per_image = [*bleu_per_image, meteor_per_image, rouge_per_image, cider_per_image]
    for name, values in zip(result.overall, per_image, strict=True):
        assert list(result.per_image[name].values()) == pytest.approx(list(values), abs=1e-12), name


def test_scores_of_one_caption_computed_by_hand() -> None:
    result = score_captions({"x": "a dog runs"}, {"x": ["A dog sleeps here."]})
    brevity_penalty = math.exp(1 - 4 / 3)  # 3 words against 4
    assert result.overall["BLEU-1"] == pytest.approx(2 / 3 * brevity_penalty, abs=1e-6)
    assert result.overall["BLEU-2"] == pytest.approx(math.sqrt(2 / 3 * 1 / 2) * brevity_penalty, abs=1e-6)
    assert result.overall["CIDEr"] == 0


def test_scores_do_not_depend_on_image_order_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    expected = scores().overall
    capfd.readouterr()
    reversed_captions = dict(reversed(CAPTIONS.items()))
    assert score_captions(reversed_captions, REFERENCES).overall == pytest.approx(expected, abs=1e-12)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("references", [{}, {"x": []}])
def test_caption_without_references_is_rejected(references: dict[str, list[str]]) -> None:
    with pytest.raises(DatasetError, match="1 of 2 captions have no references, such as that of image x"):
        score_captions({"x": "a dog", "b": "a ball"}, {**REFERENCES, **references})


def test_references_are_rejected_only_if_all_are_empty() -> None:
    with pytest.raises(DatasetError, match="references of all 1 captions are empty"):
        score_captions({"x": "a dog"}, {"x": ["...", " "]})
    assert score_captions({**CAPTIONS, "x": "a dog"}, {**REFERENCES, "x": ["..."]}).per_image["CIDEr"]["x"] == 0


def test_no_captions_are_rejected() -> None:
    with pytest.raises(DatasetError, match="at least one caption"):
        score_captions({}, REFERENCES)


def test_without_java_own_tokens_are_scored_and_meteor_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with_java = scores()
    monkeypatch.setenv("PATH", "")
    result = score_captions(CAPTIONS, REFERENCES)
    assert list(result.overall) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert result.overall == pytest.approx({name: with_java.overall[name] for name in result.overall}, abs=1e-9)


def test_intervals_contain_the_scores() -> None:
    result = scores()
    assert result.intervals.keys() == result.overall.keys()
    for name, (low, high) in result.intervals.items():
        assert 0 <= low <= result.overall[name] <= high


def test_intervals_are_reproducible_and_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # avoids METEOR, which takes seconds to start

    def score(samples: int) -> Scores:
        return score_captions(CAPTIONS, REFERENCES, bootstrap=BootstrapConfig(samples=samples))

    assert len(score(200).intervals) == 6
    assert score(200) == score(200)
    assert score(200).intervals != score(20).intervals
    assert score(0).intervals == {}


def test_scores_table_has_a_row_per_image() -> None:
    result = scores()
    table = build_scores_table(result, CAPTIONS)
    assert table.column_names == [
        *("image_id", "caption", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
    ]
    assert table["image_id"].to_pylist() == list(CAPTIONS)
    assert table["cider"].to_pylist() == list(result.per_image["CIDEr"].values())


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs Java")
def test_cider_scorer_equals_pycocoevalcap() -> None:
    references = [["A dog runs.", "The dog is running fast!"], ["Two men, on bikes", "men ride"], ["a red shirt"]]
    scorer = CiderScorer(references)
    expected = {number: [{"caption": text} for text in texts] for number, texts in enumerate(references)}
    for captions in (["a dog runs fast", "two men ride", "a shirt"], ["a red shirt", "a dog", ""]):
        hypotheses = {number: [{"caption": text}] for number, text in enumerate(captions)}
        score, _ = Cider().compute_score(*map(PTBTokenizer().tokenize, (expected, hypotheses)))
        assert scorer.score(captions) == pytest.approx(score, abs=1e-9)


def test_cider_scorer_rejects_a_single_image() -> None:
    with pytest.raises(DatasetError, match="expected several images, got 1"):
        CiderScorer([["a dog"]])
