"""Generates captions with `image_text_score`, the similarity of caption and image, and uses it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.images.decoding import decode_image
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError, FingerprintError
from captionlib.evaluation.predictions import read_predictions
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.rerank import RerankConfig
from captionlib.models.families.ranker import RankingModel, open_ranker
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from captionlib.search.index import open_index
from captionlib.search.models import ImageQueryModels
from captionlib.search.sql.session import query_sql
from captionlib.serving.app import create_app
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import SearchService
from captionlib.serving.startup import AppConfig, load_app
from captionlib.training.caption_objective import CiderValidation
from jobs.cli import captionlib
from pipelines.build_index import build_index
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig
from tests.models.attention_captioner import write_captioner
from tests.models.families.test_rankers import write_own
from tests.models.families.tiny_models import write_blip, write_clip
from tests.pipelines.conftest import write_images, write_manifest

QUIET = RunConfig(max_failure_ratio=0.5, progress=False)
CONFIG = GenerationConfig(DecodingConfig(beam_width=4, n_best=3, max_tokens=6), batch_size=3, encoder_batch_size=3)
RERANKED = replace(CONFIG, decoding=replace(CONFIG.decoding, n_best=2, rerank=RerankConfig("image_text")))


@pytest.fixture
def captioner(features: Path, tmp_path: Path) -> Path:
    encoder = open_dataset(features).config["encoder"]
    return write_captioner(tmp_path / "captioner", encoder, attention_size=0)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own(tmp_path_factory.mktemp("models") / "ranker")


def generate(source: Path, captioner: Path | str, output: Path, config: GenerationConfig, **options: Any) -> list[Any]:
    generate_captions(source, captioner, output, config, device="cpu", run=QUIET, **options)
    return read_rows(open_dataset(output).require_complete())


def read_rows(dataset: ShardedDataset) -> list[Any]:
    return [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]


def embed_stored(features: Path, ranker: RankingModel) -> dict[str, np.ndarray]:
    dataset = open_dataset(features)
    tables = [dataset.read(shard) for shard in range(dataset.shards)]
    return {
        image_id: vector
        for table in tables
        for batch in table.to_batches()
        for image_id, vector in zip(
            batch["image_id"].to_pylist(),
            ranker.encode_images(vectors_to_numpy(batch["features"], dataset.config["encoder"]["shape"])),
            strict=True,
        )
    }


def test_a_ranker_scores_every_candidate(features: Path, captioner: Path, ranker: Path, tmp_path: Path) -> None:
    rows = generate(features, captioner, tmp_path / "captions", CONFIG, ranker=ranker)
    plain = generate(features, captioner, tmp_path / "plain", CONFIG)
    assert open_dataset(tmp_path / "captions").schema.equals(captions_schema(has_scores=True))
    assert open_dataset(tmp_path / "plain").schema.equals(captions_schema())
    model = open_ranker(ranker)
    vectors = embed_stored(features, model)
    assert len(rows) == 8
    for row, without in zip(rows, plain, strict=True):
        texts = [candidate["caption"] for candidate in row["candidates"]]
        assert texts == [candidate["caption"] for candidate in without["candidates"]]
        expected = model.encode_sentences(texts) @ vectors[row["image_id"]]
        scores = [candidate["image_text_score"] for candidate in row["candidates"]]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert row["image_text_score"] == scores[0]
    predictions = read_predictions(tmp_path / "captions")
    assert [prediction.image_text_score for prediction in predictions] == [row["image_text_score"] for row in rows]
    both = [tmp_path / "captions", tmp_path / "plain"]
    table = query_sql(both, "SELECT count(*) AS all_rows, count(image_text_score) AS scored FROM captions")
    assert table.to_pylist() == [{"all_rows": 16, "scored": 8}]
    with pytest.raises(FingerprintError, match="ranker"):
        generate(features, captioner, tmp_path / "plain", CONFIG, ranker=ranker)


def test_captions_are_chosen_by_their_scores(features: Path, captioner: Path, ranker: Path, tmp_path: Path) -> None:
    wide = replace(CONFIG, decoding=replace(CONFIG.decoding, n_best=4))
    pools = generate(features, captioner, tmp_path / "pools", wide, ranker=ranker)
    chosen = generate(features, captioner, tmp_path / "chosen", RERANKED, ranker=ranker)
    changed = 0
    for row, pool in zip(chosen, pools, strict=True):
        ranked = sorted(pool["candidates"], key=lambda each: each["image_text_score"], reverse=True)
        assert row["candidates"] == ranked[:2]
        assert (row["caption"], row["log_prob"]) == (ranked[0]["caption"], ranked[0]["log_prob"])
        changed += row["caption"] != pool["caption"]
    assert changed


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of a BLIP and embeddings of a CLIP for eight images. Tests must not change them."""
    folder = tmp_path_factory.mktemp("searched")
    write_manifest(folder / "manifest", write_images(folder / "images"))
    blip, clip = f"hf:{write_blip(folder / 'blip')}", f"hf:{write_clip(folder / 'clip')}"
    outputs = {"ranker": clip, "embeddings": folder / "embeddings"}
    generate(folder / "manifest", blip, folder / "captions", RERANKED, **outputs)
    return folder


def test_a_dual_encoder_of_transformers_scores_captions_of_transformers(searched: Path) -> None:
    rows, blip, clip = read_rows(open_dataset(searched / "captions")), f"hf:{searched}/blip", f"hf:{searched}/clip"
    embeddings = {row["image_id"]: row["embedding"] for row in read_rows(open_dataset(searched / "embeddings"))}
    model = open_ranker(clip)
    for row in rows:
        pixels = decode_image(Path(row["uri"]).read_bytes(), model.find_input_transform(None)).pixels  # type: ignore[arg-type]
        vector = model.encode_images([pixels])[0]
        np.testing.assert_allclose(np.array(embeddings[row["image_id"]], np.float32), vector, atol=2e-3)
        scores = [candidate["image_text_score"] for candidate in row["candidates"]]
        expected = model.encode_sentences([candidate["caption"] for candidate in row["candidates"]]) @ vector
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        assert len(scores) == 2
        assert scores == sorted(scores, reverse=True)
    template = f"{clip}?template=on a table {{}}"
    with pytest.raises(FingerprintError, match="sentence_template"):
        generate(searched / "manifest", blip, searched / "captions", RERANKED, ranker=template)
    with ImageQueryModels(open_ranker(clip), blip, device="cpu", generation=RERANKED) as models:
        captions = models.caption(Path(rows[0]["uri"]).read_bytes()).to_pylist()
    assert [row["caption"] for row in captions] == [each["caption"] for each in rows[0]["candidates"]]
    assert captions[0]["image_text_score"] == pytest.approx(rows[0]["image_text_score"], abs=1e-4)


def write_captions(folder: Path, prefix: str, scores: Sequence[float | None]) -> str:
    """Writes captions of dogs; without the column of the scores if they are None."""
    schema = captions_schema(has_scores=scores[0] is not None)
    dataset = create_dataset(folder, "captions", schema, config={}, shards=1)
    rows = []
    for number, score in enumerate(scores):
        best = {"caption": f"a dog and {number} cats", "log_prob": -1.0 - number, "image_text_score": score}
        row = {"image_id": f"{prefix}{number}", "uri": "", "split": "val", "tokens": 6, "candidates": [best], **best}
        rows.append(row)
    with write_shard(dataset, 0, len(rows)) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=schema))
    dataset.finish()
    return str(folder)


def test_an_index_filters_and_sorts_by_the_scores(tmp_path: Path) -> None:
    scored = write_captions(tmp_path / "scored", "s", [0.25, -0.5, 0.75])
    folders = [write_captions(tmp_path / "plain", "p", [None, None]), scored]
    build_index(folders, tmp_path / "index", run=QUIET)
    index = open_index(tmp_path / "index")
    found = index.search_text("dog", sort="image_text_score").to_pylist()
    assert [(row["image_id"], row["image_text_score"]) for row in found] == [("s2", 0.75), ("s0", 0.25), ("s1", -0.5)]
    assert index.search_text("dog").num_rows == 5
    above = index.search_text("dog", where="image_text_score > 0").to_pylist()
    assert {row["image_id"] for row in above} == {"s0", "s2"}
    assert index.get_image("p0")["image_text_score"] is None
    assert index.get_details("s2")["candidates"][0]["image_text_score"] == 0.75
    assert index.get_details("p0")["candidates"][0]["image_text_score"] is None
    options = ["--text", "cats", "--sort", "image_text_score", "--where", "image_text_score < 0.5", "--limit", "1"]
    outcome = CliRunner().invoke(captionlib, ["query", str(tmp_path / "index"), *options, "--format", "jsonl"])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.output)["image_id"] == "s0"
    client = TestClient(
        create_app(SearchService(index, ServingConfig()), tmp_path / "thumbnails"), base_url="http://localhost"
    )
    assert "Fits the image" in client.get("/image?id=s2").text
    assert "Fits the image" not in client.get("/image?id=p0").text


def test_settings_that_need_a_ranker_are_explained(features: Path, captioner: Path, tmp_path: Path) -> None:
    message = r"decoding.rerank.method image_text needs a ranker, got none"
    with pytest.raises(ConfigError, match=message):
        generate(features, captioner, tmp_path / "captions", RERANKED)
    with pytest.raises(ConfigError, match=message):
        caption_images(["image.jpg"], str(captioner), RERANKED)
    with pytest.raises(ConfigError, match=message):
        ImageQueryModels(captioner=str(captioner), generation=RERANKED)
    with pytest.raises(ConfigError, match=r"rerank.method: expected none or mbr during training, got image_text"):
        CiderValidation([], [], Vocabulary.from_captions(["a dog"], 1), RERANKED.decoding)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--embeddings requires --ranker"):
        generate(features, captioner, tmp_path / "captions", CONFIG, embeddings=tmp_path / "embeddings")
    with pytest.raises(ConfigError, match=r"rerank: temperature 2.0 has no effect with method image_text"):
        RerankConfig("image_text", temperature=2.0)
    with pytest.raises(
        ConfigError, match=r"attention_maps: .* cannot be combined with decoding.rerank.method image_text"
    ):
        replace(RERANKED, attention_maps=True)


def test_commands_search_with_a_dual_encoder_of_transformers(searched: Path, tmp_path: Path) -> None:
    index, clip = f"{tmp_path}/index", f"hf:{searched}/clip"
    build_index([f"{searched}/captions"], index, embeddings=[f"{searched}/embeddings"], run=QUIET)
    image = f"{searched}/images/blue.png"
    for query, ranker in (
        (["--sentence", "a red ring"], f"{clip}?template=a photo of {{}}"),
        (["--hybrid", "a red ring"], clip),
        (["--image", image], clip),
    ):
        outcome = CliRunner().invoke(captionlib, ["query", index, *query, "-r", ranker, "--format", "jsonl"])
        assert outcome.exit_code == 0, outcome.output
        found = [json.loads(line) for line in outcome.stdout.splitlines()]
        assert len(found) == 8
        assert "--image" not in query or found[0]["uri"] == image
    app = load_app(AppConfig(index, f"{tmp_path}/thumbnails", ranker=clip, device="cpu"))
    with TestClient(app, base_url="http://localhost") as client:
        results = client.get("/api/v1/search", params={"q": "a red ring", "mode": "sentence", "limit": 2}).json()
        assert len(results["results"]) == 2
