import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.inspection import inspect_dataset
from captionlib.data.shards.schemas import captions_schema
from captionlib.errors import CheckpointError, FingerprintError
from captionlib.evaluation.predictions import read_predictions
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.search.config import IndexConfig
from captionlib.search.index import open_index
from captionlib.search.sql.queries import find_image
from captionlib.search.sql.session import open_sql
from pipelines.build_index import build_index
from pipelines.extract_features import extract_features
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig
from tests.models.attention_captioner import write_captioner
from tests.pipelines.conftest import write_images, write_manifest
from tests.pipelines.test_generate_captions import rows

QUIET = RunConfig(max_failure_ratio=0.5, progress=False)
MAPS = GenerationConfig(DecodingConfig(beam_width=3, max_tokens=6), batch_size=3, attention_maps=True)
ENCODER = EncoderConfig("squeezenet1_1", "features.7.cat", "random:0")


@pytest.fixture
def features(manifest: ShardedDataset, tmp_path: Path) -> Path:
    extract_features(manifest.folder.uri, tmp_path / "features", ExtractionConfig(ENCODER, batch_size=3), run=QUIET)
    return tmp_path / "features"


@pytest.fixture
def captioner(features: Path, tmp_path: Path) -> Path:
    return write_captioner(tmp_path / "captioner", open_dataset(features).config["encoder"])


def caption(
    source: Path | str, captioner: Path, output: Path, config: GenerationConfig = MAPS, run: RunConfig = QUIET
) -> ShardedDataset:
    generate_captions(source, captioner, output, config, device="cpu", run=run)
    return open_dataset(output, "captions").require_complete()


def test_each_token_has_its_attention_map(features: Path, captioner: Path, tmp_path: Path) -> None:
    dataset = caption(features, captioner, tmp_path / "captions")
    loaded = load_captioner(captioner)
    positions, channels = loaded.encoder["shape"]
    assert dataset.read(0).schema.equals(captions_schema(positions))
    ends = set()
    for row, source in zip(rows(dataset), rows(open_dataset(features)), strict=True):
        words = loaded.vocabulary.encode(str(row["caption"]))
        image = torch.tensor(source["features"], dtype=torch.float32).view(1, positions, channels)
        with torch.inference_mode():
            (expected,) = loaded.model.attention_weights(image, pad_sentences([words]), torch.tensor([0]))
        maps = np.array(row["attention"])
        ends.add(len(maps) - len(words))
        assert len(maps) == row["tokens"]
        np.testing.assert_allclose(maps, expected[: len(maps)], rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(maps.sum(1), 1, atol=2e-3)
        assert maps.max() > 2 * maps.min(), "attention is not uniform"
    assert ends == {0, 1}, "truncated captions have no map for END"


def test_maps_from_images_equal_maps_from_features(
    manifest: ShardedDataset, features: Path, captioner: Path, tmp_path: Path
) -> None:
    from_features = rows(caption(features, captioner, tmp_path / "of-features"))
    assert from_features == rows(caption(manifest.folder.uri, captioner, tmp_path / "of-images"))
    without = caption(features, captioner, tmp_path / "without", dataclasses.replace(MAPS, attention_maps=False))
    assert without.schema.equals(captions_schema())
    for row in from_features:
        del row["attention"]
    assert rows(without) == from_features


def test_captions_with_and_without_maps_do_not_mix(features: Path, captioner: Path, tmp_path: Path) -> None:
    caption(features, captioner, tmp_path / "captions", dataclasses.replace(MAPS, attention_maps=False))
    with pytest.raises(FingerprintError, match="attention_maps: was False, now True"):
        caption(features, captioner, tmp_path / "captions")


def test_captioner_without_attention_is_rejected_before_work_starts(features: Path, tmp_path: Path) -> None:
    plain = write_captioner(tmp_path / "without-attention", open_dataset(features).config["encoder"], attention_size=0)
    with pytest.raises(
        CheckpointError, match="without-attention: attention_maps needs a captioner with attention to a feature map"
    ):
        caption(features, plain, tmp_path / "captions")
    assert not (tmp_path / "captions").exists()
    with pytest.raises(CheckpointError, match="attention_maps needs"):
        caption_images([str(tmp_path / "no-image-is-read.png")], str(plain), MAPS, device="cpu")


def test_retried_images_have_maps(captioner: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    manifest = write_manifest(tmp_path / "own-manifest", images)
    caption(manifest.folder.uri, captioner, tmp_path / "captions")
    Image.new("RGB", (80, 60), "red").save(images[9])
    again = dataclasses.replace(QUIET, retry_failures=True)
    by_id = {
        row["image_id"]: row for row in rows(caption(manifest.folder.uri, captioner, tmp_path / "captions", run=again))
    }
    assert by_id["missing.png"]["attention"] == by_id["red.png"]["attention"]
    assert by_id["missing.png"]["caption"] == by_id["red.png"]["caption"]


def test_readers_ignore_attention_column(features: Path, captioner: Path, tmp_path: Path) -> None:
    written = rows(caption(features, captioner, tmp_path / "captions"))
    assert [one.caption for one in read_predictions(tmp_path / "captions")] == [row["caption"] for row in written]
    with open_sql(tmp_path / "captions") as session:
        assert find_image(session, "red.png")["attention"].to_pylist() == [
            row["attention"] for row in written if row["image_id"] == "red.png"
        ]
    build_index(tmp_path / "captions", tmp_path / "index", IndexConfig(), run=QUIET)
    assert len(open_index(tmp_path / "index")) == len(written)
    assert "fixed_size_list<item: halffloat>[729]" in inspect_dataset(tmp_path / "captions").columns["attention"]
