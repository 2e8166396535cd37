import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError, ConfigError, DatasetError
from captionlib.evaluation.bootstrap import BootstrapConfig
from captionlib.evaluation.diversity import count_diversity, measure_captions
from captionlib.evaluation.evaluate import evaluate_captions
from captionlib.evaluation.perplexity import measure_perplexity
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import save_captioner
from tests.evaluation.test_caption_scores import CAPTIONS, REFERENCES, write, write_captions, write_manifest

VOCABULARY = Vocabulary.from_captions(["a dog runs", "the grass"], min_count=1)
ENCODER = {"model": "none", "shape": [3]}


def write_captioner(folder: Path, encoder: dict[str, Any] = ENCODER) -> Path:
    torch.manual_seed(0)
    model = CaptionerNetwork(CaptionerConfig(hidden_size=4, embedding_size=4), 3, len(VOCABULARY)).eval()
    save_captioner(folder, model, VOCABULARY, encoder, provenance={}, training={})
    return folder


def write_features(folder: Path, ids: list[str]) -> Path:
    schema = features_schema(3, "float32")
    dataset = create_dataset(folder, "features", schema, config={"encoder": ENCODER}, shards=1)
    rows = [
        {"image_id": i, "uri": i, "split": "val", "captions": [], "features": [float(n), 1.0, -1.0]}
        for n, i in enumerate(ids)
    ]
    with write_shard(dataset, 0, len(rows)) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=schema))
    dataset.finish()
    return folder


def test_perplexity_of_each_image_and_of_the_set(tmp_path: Path) -> None:
    checkpoint = write_captioner(tmp_path / "captioner")
    features = write_features(tmp_path / "features", ["x", "not requested", "y"])
    references = {"y": ["A dog!", "the dog runs wild"], "x": ["grass", ""]}
    metric = measure_perplexity(checkpoint, features, references)
    model = CaptionerNetwork(CaptionerConfig(hidden_size=4, embedding_size=4), 3, len(VOCABULARY)).eval()
    torch.manual_seed(0)
    model = CaptionerNetwork(CaptionerConfig(hidden_size=4, embedding_size=4), 3, len(VOCABULARY)).eval()

    def loss(vector: list[float], sentence: str) -> float:
        words = torch.tensor([VOCABULARY.encode(sentence)])
        scores: torch.Tensor = model(torch.tensor([vector]), words, torch.tensor([0])).log_probs
        return -float(scores.detach().double().sum())

    loss_y = loss([2.0, 1.0, -1.0], "a dog") + loss([2.0, 1.0, -1.0], "the dog runs wild")
    loss_x = loss([0.0, 1.0, -1.0], "grass")
    assert metric.rows == pytest.approx(np.array([[loss_y, 3 + 5], [loss_x, 2]]), rel=1e-5)
    assert metric.formula(metric.rows.sum(0)) == pytest.approx([math.exp((loss_y + loss_x) / 10)], rel=1e-5)


def test_perplexity_rejects_an_image_without_features(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", ["x"])
    with pytest.raises(DatasetError, match="1 of 2 images have no features, such as y"):
        measure_perplexity(write_captioner(tmp_path / "captioner"), features, {"x": ["a"], "y": ["a"]})


def test_perplexity_rejects_features_of_another_encoder(tmp_path: Path) -> None:
    features = write_features(tmp_path / "features", ["x"])
    checkpoint = write_captioner(tmp_path / "captioner", {"model": "other", "shape": [3]})
    with pytest.raises(CheckpointError, match="a different encoder"):
        measure_perplexity(checkpoint, features, {"x": ["a"]})


def test_captions_are_novel_if_no_training_reference_has_the_same_words() -> None:
    captions = {"1": "a dog runs", "2": "a dog 's ball", "3": "a dog", "4": "a dog runs"}
    length, novel = measure_captions(captions, ["A dog runs.", "A dog's ball!", "a dog runs fast"])
    assert length.formula(length.rows.sum(0)) == pytest.approx([(3 + 4 + 2 + 3) / 4])
    assert novel.formula(novel.rows)[:, 0].tolist() == [0, 0, 1, 0]
    assert count_diversity(captions) == {"distinct_captions": 3, "vocabulary_size": 5}
    assert len(measure_captions(captions)) == 1


def test_evaluation_has_all_scores(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    rows = [{"image_id": i, "uri": i, "split": "val", "captions": texts} for i, texts in REFERENCES.items()]
    rows.append({"image_id": "t", "uri": "t", "split": "train", "captions": ["Two men on a beach!"]})
    manifest = write_manifest(tmp_path / "reference", REFERENCES)
    write(tmp_path / "manifest", "manifest", manifest.schema, rows)
    features = write_features(tmp_path / "features", [*CAPTIONS, "other"])
    evaluation = evaluate_captions(
        tmp_path / "captions",
        tmp_path / "manifest",
        splits=["val"],
        checkpoint=write_captioner(tmp_path / "captioner"),
        features=features,
        bootstrap=BootstrapConfig(samples=20),
    )
    assert evaluation.captions == CAPTIONS
    assert [prediction.image_id for prediction in evaluation.predictions] == sorted(CAPTIONS)
    result = evaluation.to_dict()
    assert list(result["scores"]) == [
        *("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"),
        *("perplexity", "mean_length", "novel"),
    ]
    assert result["scores"]["novel"] == 3 / 4
    assert result["intervals"].keys() == result["scores"].keys()
    assert (result["images"], result["tokenizer"]) == (4, "ptb")
    (note,) = result["notes"]
    assert note.startswith("1 of 5 images with references have no caption, such as never captioned;")


def test_checkpoint_without_features_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="specify both or neither"):
        evaluate_captions(tmp_path, checkpoint=tmp_path)


def test_novel_share_is_left_out_without_training_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # avoids METEOR, which takes seconds to start
    write_captions(tmp_path / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    evaluation = evaluate_captions(tmp_path / "captions", tmp_path / "manifest", bootstrap=BootstrapConfig(samples=0))
    assert evaluation.tokenizer == "captionlib"
    assert "novel" not in evaluation.scores.overall
    assert "no references in split train or restval" in evaluation.notes[-1]


def test_incomplete_captions_are_noted_or_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest", {"1": ["a dog runs on grass"], "2": ["two men"], "3": ["a bus"], "4": []})
    (tmp_path / "results.json").write_text('[{"image_id": 1, "caption": "a dog runs"}]')
    sources = tmp_path / "results.json", tmp_path / "manifest"
    notes = evaluate_captions(*sources, splits=["val"], bootstrap=BootstrapConfig(samples=0)).notes
    assert any(note.startswith("2 of 3 images with references have no caption, such as 2;") for note in notes)
    assert any(note.startswith("CIDEr is meaningless for one image") for note in notes)
    with pytest.raises(DatasetError, match=r"2 of 3 images .* have no caption, .*omit --require-all"):
        evaluate_captions(*sources, splits=["val"], require_all=True)
