import dataclasses
from pathlib import Path

import numpy as np
import pytest

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import ConfigError, DatasetError, FailureRatioError, FingerprintError
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.inference.extraction import ExtractionConfig
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig, choose_runner
from tests.pipelines.conftest import write_images, write_manifest

QUIET = RunConfig(max_failure_ratio=0.5, progress=False)


def extract(manifest: ShardedDataset, output: Path, config: ExtractionConfig, run: RunConfig = QUIET) -> ShardedDataset:
    extract_features(manifest.folder.uri, output, config, run=run)
    return open_dataset(output, "features").require_complete()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


def test_each_image_becomes_a_row_or_a_failure(
    manifest: ShardedDataset, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    features = extract(manifest, tmp_path / "features", small_encoder)
    totals = features.compute_totals()
    assert (totals.rows, totals.failures) == (8, 2)
    rows = [row for shard in range(3) for row in features.read(shard).to_pylist()]
    assert [row["image_id"] for row in rows] == [
        f"{name}.png" for name in ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
    ]
    assert rows[0]["captions"] == ["a red field", "all of it is red"]
    failures = [table.to_pylist()[0] for shard in range(3) if (table := features.read_failures(shard)) is not None]
    assert [(row["image_id"], row["stage"]) for row in failures] == [("broken.png", "decode"), ("missing.png", "fetch")]


def test_features_equal_the_encoder_output(
    manifest: ShardedDataset, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    features = extract(manifest, tmp_path / "features", small_encoder)
    encoder = load_encoder(small_encoder.encoder)
    white = encoder.encode(np.full((1, 224, 224, 3), 255, np.uint8))[0]
    stored = features.read(2).to_pylist()[0]
    assert stored["image_id"] == "white.png"
    np.testing.assert_allclose(stored["features"], white, rtol=2e-3, atol=1e-3)
    assert features.config["encoder"] == encoder.description


def test_second_run_changes_nothing(manifest: ShardedDataset, features: Path, small_encoder: ExtractionConfig) -> None:
    times = {path: path.stat().st_mtime_ns for path in features.glob("part-*")}
    extract(manifest, features, small_encoder)
    assert {path: path.stat().st_mtime_ns for path in features.glob("part-*")} == times


def test_missing_shards_are_reproduced_exactly(
    manifest: ShardedDataset, features: Path, small_encoder: ExtractionConfig
) -> None:
    before = content(features)
    open_dataset(features).remove_marker(1)
    (features / "part-00001.parquet").unlink()
    extract(manifest, features, small_encoder)
    assert content(features) == before


def test_repeated_bundles_write_identical_output(
    manifest: ShardedDataset, features: Path, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    twice = dataclasses.replace(QUIET, beam_options=("--direct_runner_bundle_repeat=1",))
    extract(manifest, tmp_path / "twice", small_encoder, twice)
    assert content(features) == content(tmp_path / "twice")


def test_two_workers_write_identical_output(
    manifest: ShardedDataset, features: Path, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    extract(manifest, tmp_path / "two", small_encoder, dataclasses.replace(QUIET, workers=2))
    assert content(features) == content(tmp_path / "two")


def test_retry_processes_repaired_images_only(tmp_path: Path, small_encoder: ExtractionConfig) -> None:
    images = write_images(tmp_path / "images")
    manifest = write_manifest(tmp_path / "manifest", images)
    extract(manifest, tmp_path / "features", small_encoder)
    Path(images[3]).write_bytes(Path(images[0]).read_bytes())
    retry = dataclasses.replace(QUIET, retry_failures=True)
    features = extract(manifest, tmp_path / "features", small_encoder, retry)
    assert features.read(0)["image_id"].to_pylist() == ["red.png", "green.png", "blue.png", "broken.png"]
    assert features.compute_totals().reasons == {"NotFound": 1}


def test_another_encoder_is_rejected(manifest: ShardedDataset, features: Path, small_encoder: ExtractionConfig) -> None:
    other = dataclasses.replace(small_encoder, encoder=dataclasses.replace(small_encoder.encoder, weights="random:1"))
    with pytest.raises(FingerprintError, match=r"encoder.weights: was 'random:0', now 'random:1'"):
        extract(manifest, features, other)


def test_too_many_failures_raise_but_keep_all_rows(
    manifest: ShardedDataset, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    strict = dataclasses.replace(QUIET, max_failure_ratio=0.1)
    with pytest.raises(FailureRatioError, match=r"2 of 10 images \(20.0%\) failed"):
        extract(manifest, tmp_path / "features", small_encoder, strict)
    assert len(content(tmp_path / "features")) == 3
    assert extract(manifest, tmp_path / "features", small_encoder).compute_totals().rows == 8


def test_incomplete_manifest_is_rejected(
    manifest: ShardedDataset, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    manifest.remove_marker(1)
    with pytest.raises(DatasetError, match="is not complete: expected 3 finished shards, got 2;"):
        extract(manifest, tmp_path / "features", small_encoder)


def test_folders_may_be_remote(
    manifest: ShardedDataset, features: Path, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    output = f"memory://{tmp_path.name}/features"
    extract_features(manifest.folder.uri, output, small_encoder, run=QUIET)
    local = open_dataset(features)
    assert ShardedDataset(**{**vars(local), "folder": type(local.folder)(output)}).read(0).equals(local.read(0))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (RunConfig(beam_options=("--no_such_thing=1",)), "--no_such_thing=1 is not an option"),
        (RunConfig(workers=2, beam_options=("--runner=FlinkRunner",)), "--workers 2 applies to this machine"),
    ],
)
def test_unusable_options_are_rejected(run: RunConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_runner(run)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig(model="vgg61"), r"unknown model 'vgg61'; torchvision has \d+ models, among them vgg1"),
        (
            EncoderConfig("squeezenet1_1", "features.4.ca", "random:0"),
            "no node 'features.4.ca'; similar nodes: features.4.cat",
        ),
        (EncoderConfig("squeezenet1_1", "features.4.cat", "nothing.pth"), "nothing.pth: file not found"),
        (EncoderConfig("squeezenet1_1", "features.4.cat", "random:x"), "expected random:SEED"),
        (EncoderConfig("squeezenet1_1", "features.4.cat", "IMAGENET"), "expected IMAGENET1K_V1 or"),
    ],
)
def test_invalid_encoder_fails_before_anything_is_written(
    manifest: ShardedDataset, tmp_path: Path, config: EncoderConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        extract(manifest, tmp_path / "features", ExtractionConfig(config))
    assert not (tmp_path / "features").exists()
