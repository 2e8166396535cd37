import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.inspection import collect_failures
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import DatasetError, FetchError
from captionlib.evaluation.caption_scores import score_captions
from captionlib.evaluation.predictions import Prediction, to_result_struct
from captionlib.evaluation.report import write_report
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import save_captioner
from jobs.cli import captionlib
from tests.data.shards.test_inspection import write
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


def read_main(folder: Path) -> str:
    return " ".join(read_page(folder).text.split())


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out METEOR, which takes seconds to start."""
    for module in ("evaluate", "caption_scores"):
        monkeypatch.setattr(f"captionlib.evaluation.{module}.has_java", lambda: False)


@pytest.mark.usefixtures("without_java")
def test_comparison_shows_both_captions_and_the_difference_of_all_scores(tmp_path: Path) -> None:
    changed = {**CAPTIONS, next(iter(CAPTIONS)): "zebra"}
    write_captions(tmp_path / "captions", CAPTIONS)
    write_captions(tmp_path / "greedy", changed)
    write_manifest(tmp_path / "manifest", REFERENCES)
    options = ["-m", tmp_path / "manifest", "--compare", tmp_path / "greedy"]
    output = report(tmp_path / "captions", "-o", tmp_path / "report", *options)
    assert "; better caption by CIDEr: captions 1, greedy 0, equal 3\n" in output
    first, *others = read_items(tmp_path / "report")
    assert first["baseline"]["caption"] == "zebra"
    assert first["baseline"]["gain"] == pytest.approx(first["cider"] - first["baseline"]["cider"], abs=2e-4)
    assert [item["baseline"]["gain"] for item in others] == [0, 0, 0]
    text = read_main(tmp_path / "report")
    assert "A 1 (25.0%) equal 3 B 0 (0.0%)" in text
    value, other = (score_captions(each, REFERENCES).overall["ROUGE-L"] for each in (CAPTIONS, changed))
    assert f"ROUGE-L {value:.3f} {other:.3f} {value - other:+.3f}" in text
    assert "captions compared with greedy" in text


@pytest.mark.usefixtures("without_java")
def test_comparison_of_equal_captions_has_no_difference(tmp_path: Path) -> None:
    write_captions(tmp_path / "a" / "captions", CAPTIONS)
    write_captions(tmp_path / "b" / "captions", CAPTIONS)
    write_manifest(tmp_path / "manifest", REFERENCES)
    options = ["-m", tmp_path / "manifest", "--compare", tmp_path / "b" / "captions"]
    report(tmp_path / "a" / "captions", "-o", tmp_path / "report", *options)
    text = read_main(tmp_path / "report")
    assert "a/captions compared with b/captions" in text
    assert "+0.000 +0.000 to +0.000" in text


def test_comparison_leaves_out_images_of_one_run_and_needs_no_references(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    first, second, *_ = CAPTIONS
    write_captions(tmp_path / "other", {first: "zebra", second: CAPTIONS[second], "extra": "a bird"})
    report(tmp_path / "captions", "-o", tmp_path / "report", "--compare", tmp_path / "other")
    assert [item["id"] for item in read_items(tmp_path / "report")] == [first, second]
    text = read_main(tmp_path / "report")
    assert "2 images of captions have no caption in other and are left out." in text
    assert "1 images of other have no caption in captions and are left out." in text
    assert "There are no references, so the captions have no scores. 1 of 2 images have different captions." in text


def test_comparison_of_different_images_is_an_error(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_captions(tmp_path / "other", {"x": "a bird"})
    with pytest.raises(
        DatasetError, match=r"captions and other have no image in common: .* got for example '.*' in captions and 'x'"
    ):
        report(tmp_path / "captions", "-o", tmp_path / "report", "--compare", tmp_path / "other")


def test_comparison_with_an_unfinished_dataset_is_an_error(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions", CAPTIONS)
    write_captions(tmp_path / "other", CAPTIONS)
    (tmp_path / "other" / "_SUCCESS").unlink()
    with pytest.raises(DatasetError, match="other is not complete"):
        report(tmp_path / "captions", "-o", tmp_path / "report", "--compare", tmp_path / "other")


def test_report_lists_images_without_a_caption_by_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "manifest", done=3)
    source.finish()
    output = create_dataset(tmp_path / "captions", "captions", captions_schema(), config={}, source=source)
    for shard, marker in source.read_markers().items():
        with write_shard(output, shard, 1, marker.checksum) as writer:
            writer.write_failure({"image_id": f"i{shard}", "uri": "gone.jpg"}, FetchError("NotFound", "no file"))
    output.finish(max_failure_ratio=1)
    failures = collect_failures(output)
    assert {reason: (each.count, len(each.examples)) for reason, each in failures.items()} == {
        "NotFound": (4, 4),
        "Truncated": (2, 2),
    }
    predictions = [Prediction("1", "a dog")]
    write_report(tmp_path / "report", "Captions", predictions, failures=failures)
    text = read_main(tmp_path / "report")
    assert "6 images of all splits could not be read, so they have no caption." in text
    assert "Not found 4 images" in text
