import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.sampling import estimate_remaining, open_stage_input
from captionlib.errors import ConfigError, FingerprintError
from captionlib.models.inference.extraction import ExtractionConfig
from jobs.cli import captionlib
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig
from tests.pipelines.conftest import write_manifest

QUIET = RunConfig(max_failure_ratio=1, progress=False)


def read_ids(folder: str | Path) -> list[str]:
    dataset = open_dataset(folder).require_complete()
    return [image_id for shard in range(dataset.shards) for image_id in dataset.read(shard)["image_id"].to_pylist()]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, [5]), (2, [2, 7]), (5, [1, 3, 5, 7, 9]), (10, list(range(10))), (99, list(range(10)))],
)
def test_sample_is_evenly_spaced_over_all_shards(tmp_path: Path, limit: int, expected: list[int]) -> None:
    manifest = write_manifest(tmp_path / "manifest", [f"{number}.png" for number in range(10)], shard_size=4)
    with open_stage_input(manifest, tmp_path / "output", limit, workers=2) as sample:
        assert read_ids(sample.dataset.folder.uri) == [f"{number}.png" for number in expected]
        assert sample.dataset.shards == min(2, len(expected))
    assert list((tmp_path / "output").iterdir()) == []


def test_features_of_a_sample_equal_those_of_all_images_and_give_an_estimate(
    manifest: ShardedDataset, features: Path, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    totals = extract_features(manifest.folder.uri, tmp_path / "sample", small_encoder, limit=5, run=QUIET)
    assert (totals.rows, totals.failures) == (3, 2)  # every other image, among them the two broken ones
    sample, everything = open_dataset(tmp_path / "sample"), open_dataset(features)
    assert sample.manifest_id == everything.manifest_id
    rows = {row["image_id"]: row for shard in range(3) for row in everything.read(shard).to_pylist()}
    assert [rows[row["image_id"]] for row in sample.read(0).to_pylist()] == sample.read(0).to_pylist()
    assert not (tmp_path / "sample" / "__sample").exists()
    estimate = estimate_remaining(manifest, [sample], workers=2)
    assert (estimate.images, estimate.failures) == (5, 2)
    assert estimate.images_per_second == pytest.approx(2 * 5 / totals.seconds)
    assert estimate.seconds == pytest.approx(totals.seconds / 2)
    assert 0 < estimate.bytes < totals.bytes  # the other half, without the footers
    modified = (tmp_path / "sample" / "part-00000.parquet").stat().st_mtime_ns
    assert extract_features(manifest.folder.uri, tmp_path / "sample", small_encoder, limit=5, run=QUIET) == totals
    assert (tmp_path / "sample" / "part-00000.parquet").stat().st_mtime_ns == modified


def test_run_on_all_images_does_not_continue_a_sample(
    manifest: ShardedDataset, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    extract_features(manifest.folder.uri, tmp_path / "sample", small_encoder, limit=5, run=QUIET)
    with pytest.raises(FingerprintError, match="sample: was 5, now"):
        extract_features(manifest.folder.uri, tmp_path / "sample", small_encoder, run=QUIET)
    overwrite = dataclasses.replace(QUIET, overwrite=True)  # must not delete the input
    with pytest.raises(ConfigError, match="is the input of this command"):
        extract_features(manifest.folder.uri, manifest.folder.uri, small_encoder, limit=5, run=overwrite)


def test_commands_print_the_estimate(manifest: ShardedDataset, captioner: Path, features: Path, tmp_path: Path) -> None:
    arguments = ["generate-captions", str(features), "-c", str(captioner), "-o", str(tmp_path / "sample"), "--limit"]
    result = CliRunner().invoke(
        captionlib, [*arguments, "2", "--device", "cpu", "--no-progress"], catch_exceptions=False
    )
    first, last = result.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/sample: 2 rows in 1 shards")
    assert last.startswith("The other 6 images: about 0.00 hours (")
    assert last.endswith(" 0 failures")
    assert read_ids(tmp_path / "sample") == ["blue.png", "black.png"]
