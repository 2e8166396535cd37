import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from captionlib.data.text.vocabulary import Vocabulary
from captionlib.evaluation.predictions import Prediction, to_result_struct
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import save_captioner
from jobs.cli import captionlib
from tests.evaluation.test_caption_scores import CAPTIONS, REFERENCES, scores, write_captions, write_manifest
from tests.evaluation.test_report import read_items, read_page


def report(*arguments: str | Path) -> str:
    options = ["report", *map(str, arguments), "--no-progress"]
    return CliRunner().invoke(captionlib, options, catch_exceptions=False).output


def test_report_shows_scores_and_training_curves(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    vocabulary = Vocabulary.from_captions(["a dog"], 1)
    model = CaptionerNetwork(CaptionerConfig(hidden_size=2, embedding_size=2), 3, len(vocabulary))
    training = {"history": [{"epoch": 1, "perplexity": 9.0}, {"epoch": 2, "perplexity": 7.5}]}
    save_captioner(tmp_path / "captioner", model, vocabulary, {}, provenance={}, training=training)
    options = ["-m", tmp_path / "manifest", "-c", tmp_path / "captioner", "--limit", 3]
    output = report(tmp_path / "captions", "-o", tmp_path / "report", *options)
    assert output == f"{tmp_path}/report/index.html: 3 images\n"
    expected = scores()
    items = read_items(tmp_path / "report")
    assert {item["id"]: item["cider"] for item in items} == pytest.approx(
        {i: expected.per_image["CIDEr"][i] for i in list(CAPTIONS)[:3]}, abs=1e-4
    )
    text = read_page(tmp_path / "report").text
    assert f"{expected.overall['METEOR']:.3f}" in text
    assert "last 7.5" in text


def test_captions_without_references_have_no_scores(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    report(tmp_path / "captions", "-o", tmp_path / "report", "--title", "New images")
    assert [item["cider"] for item in read_items(tmp_path / "report")] == [None] * 4
    assert "New images" in read_page(tmp_path / "report").text


def test_result_struct_is_shown_with_its_images(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "7.jpg")
    predictions = [Prediction("7", "a dog", "7.jpg", log_prob=-1.0, references=("A dog.",))]
    (tmp_path / "result_struct.json").write_text(json.dumps(to_result_struct(predictions, {})))
    report(tmp_path / "result_struct.json", "-o", tmp_path / "report", "--images", tmp_path)
    (item,) = read_items(tmp_path / "report")
    assert (tmp_path / "report" / item["thumbnail"]).is_file()
    assert item["references"] == ["A dog."]
