"""Builds a datastore, then generates captions with `decoding.rerank.neighbors`."""

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import CheckpointError, ConfigError, DatasetError, FingerprintError, StorageError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.datastore import read_datastore, read_datastore_fingerprint, write_datastore
from captionlib.models.decoding.rerank import RerankConfig
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from captionlib.models.inference.datastore import DatastoreConfig, build_datastore
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from jobs.cli import captionlib
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig

QUIET = RunConfig(max_failure_ratio=0.5, progress=False)
RERANK = RerankConfig("mbr", temperature=5.0, neighbors=3)
GENERATION = GenerationConfig(DecodingConfig(beam_width=6, n_best=6, rerank=RERANK), encoder_batch_size=3)


def build(source: Path | str, captioner: Path, *splits: str) -> tuple[int, int]:
    config = DatastoreConfig(splits) if splits else DatastoreConfig()
    return build_datastore(source, captioner, config, device="cpu", progress=False)


def caption(
    source: Path, captioner: Path, output: Path, config: GenerationConfig = GENERATION
) -> list[dict[str, object]]:
    generate_captions(source, captioner, output, config, device="cpu", run=QUIET)
    dataset = open_dataset(output, "captions").require_complete()
    return [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]


def test_neighbors_reorder_candidates(features: Path, captioner: Path, tmp_path: Path) -> None:
    assert build(features, captioner) == (5, 0)  # eight images are readable, three of them in split val
    reranked = caption(features, captioner, tmp_path / "with")
    plain = replace(GENERATION, decoding=replace(GENERATION.decoding, rerank=replace(RERANK, neighbors=0)))
    without = caption(features, captioner, tmp_path / "without", plain)
    assert [row["caption"] for row in reranked] != [row["caption"] for row in without]
    for row, other in zip(reranked, without, strict=True):
        assert {one["caption"] for one in row["candidates"]} == {one["caption"] for one in other["candidates"]}


def test_datastore_from_images_equals_datastore_from_features(
    manifest: ShardedDataset, features: Path, captioner: Path, tmp_path: Path
) -> None:
    build(features, captioner)
    of_features = caption(features, captioner, tmp_path / "captions")
    assert build(manifest.folder.uri, captioner) == (5, 2)  # two images are unreadable
    assert caption(features, captioner, tmp_path / "again") == of_features


def test_datastore_contains_only_named_splits(features: Path, captioner: Path) -> None:
    assert build(features, captioner, "val") == (3, 0)
    with pytest.raises(DatasetError, match="expected images with captions in split test, got none"):
        build(features, captioner, "test")
    datastore = read_datastore(captioner, load_captioner(captioner))  # the failed build kept it
    assert len(datastore.find_neighbors(np.zeros((1, 128), np.float32), 9)[0].references) == 6


def test_datastore_of_a_checkpoint_that_is_removed_meanwhile_is_an_error(captioner: Path) -> None:
    loaded = load_captioner(captioner)
    shutil.rmtree(captioner)
    with pytest.raises(CheckpointError, match="was removed or moved"):
        write_datastore(captioner, loaded, "", [], [])


def test_caption_images_uses_datastore(images: list[str], features: Path, captioner: Path) -> None:
    build(features, captioner)
    rows, failures = caption_images(images[:2], str(captioner), GENERATION, device="cpu")
    assert len(rows) == 2
    assert not failures


def test_captions_are_refused_with_another_datastore(features: Path, captioner: Path, tmp_path: Path) -> None:
    build(features, captioner)
    caption(features, captioner, tmp_path / "captions")
    build(features, captioner, "val")
    with pytest.raises(FingerprintError, match="datastore"):
        caption(features, captioner, tmp_path / "captions")


def test_missing_datastore_error_names_command(features: Path, captioner: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"neighbors needs datastore.parquet, which is missing; write it with `captionlib build-datastore",
    ):
        caption(features, captioner, tmp_path / "captions")
    assert not (tmp_path / "captions").exists()


@pytest.mark.parametrize("damage", [lambda whole: whole[:100], lambda whole: whole[:4] + bytes(200) + whole[204:]])
def test_damaged_datastore_is_rejected(
    damage: Callable[[bytes], bytes], features: Path, captioner: Path, tmp_path: Path
) -> None:
    build(features, captioner)
    file = captioner / "datastore.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        CheckpointError,
        match=r"datastore.parquet is damaged .*; write it again with `captionlib build-datastore FEATURES -c",
    ):
        caption(features, captioner, tmp_path / "captions")


def test_failing_storage_is_not_called_damage(features: Path, captioner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(features, captioner)
    loaded = load_captioner(captioner)
    monkeypatch.setattr(pq, "ParquetFile", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError, match=r"datastore.parquet cannot be read: Input/output error"):
        read_datastore_fingerprint(captioner, loaded)


def test_training_again_deletes_datastore(features: Path, captioner: Path) -> None:
    build(features, captioner)
    loaded = load_captioner(captioner)
    read_datastore_fingerprint(captioner, loaded)
    other = replace(loaded, fingerprint="another")
    with pytest.raises(
        CheckpointError, match=f"datastore for captioner another, got the one for captioner {loaded.fingerprint}"
    ):
        read_datastore_fingerprint(captioner, other)
    config = CaptionerTrainingConfig(
        captioner=CaptionerConfig(hidden_size=8, embedding_size=8), training=TrainingConfig(epochs=1), min_count=1
    )
    train_captioner(features, captioner, config, device="cpu", overwrite=True, progress=False)
    assert not (captioner / "datastore.parquet").exists()


def test_training_rejects_neighbors(features: Path, tmp_path: Path) -> None:
    config = CaptionerTrainingConfig(best_by="cider", decoding=GENERATION.decoding, min_count=1)
    with pytest.raises(ConfigError, match="neighbors: expected 0 during training, got 3"):
        train_captioner(features, tmp_path / "captioner", config, device="cpu", progress=False)


def test_commands_report_datastore_size(features: Path, captioner: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(captionlib, ["build-datastore", str(features), "-c", str(captioner), "--no-progress"])
    assert run.exit_code == 0, run.output
    assert f"{captioner}: 5 images in the datastore" in run.output
    shown = CliRunner().invoke(captionlib, ["inspect", str(captioner)])
    assert "5 images" in shown.output
