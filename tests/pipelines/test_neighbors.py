"""Captions that what was said of like images has a say in: `remember`, then captions with `decoding.neighbors`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import CheckpointError, ConfigError, DatasetError, FingerprintError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.datastore import read_datastore, read_datastore_fingerprint
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


def remember(source: Path | str, captioner: Path, *splits: str) -> tuple[int, int]:
    config = DatastoreConfig(splits) if splits else DatastoreConfig()
    return build_datastore(source, captioner, config, device="cpu", progress=False)


def caption(
    source: Path, captioner: Path, output: Path, config: GenerationConfig = GENERATION
) -> list[dict[str, object]]:
    generate_captions(source, captioner, output, config, device="cpu", run=QUIET)
    dataset = open_dataset(output, "captions").require_complete()
    return [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]


def test_what_was_said_of_like_images_reorders_the_candidates(features: Path, captioner: Path, tmp_path: Path) -> None:
    assert remember(features, captioner) == (5, 0)  # of eight that could be read three are of split val
    with_them = caption(features, captioner, tmp_path / "with")
    plain = replace(GENERATION, decoding=replace(GENERATION.decoding, rerank=replace(RERANK, neighbors=0)))
    without = caption(features, captioner, tmp_path / "without", plain)
    assert [row["caption"] for row in with_them] != [row["caption"] for row in without]
    for row, other in zip(with_them, without, strict=True):
        assert {one["caption"] for one in row["candidates"]} == {one["caption"] for one in other["candidates"]}


def test_images_and_features_are_remembered_alike(
    manifest: ShardedDataset, features: Path, captioner: Path, tmp_path: Path
) -> None:
    remember(features, captioner)
    of_features = caption(features, captioner, tmp_path / "captions")
    assert remember(manifest.folder.uri, captioner) == (5, 2)  # two could not be read
    assert caption(features, captioner, tmp_path / "again") == of_features


def test_only_splits_that_are_named_are_remembered(features: Path, captioner: Path) -> None:
    assert remember(features, captioner, "val") == (3, 0)
    with pytest.raises(DatasetError, match="expected images with captions in split test, got none"):
        remember(features, captioner, "test")
    kept = read_datastore(captioner, load_captioner(captioner))  # the one before
    assert len(kept.find_neighbors(np.zeros((1, 128), np.float32), 9)[0].references) == 6


def test_single_images_are_captioned_with_neighbours_too(images: list[str], features: Path, captioner: Path) -> None:
    remember(features, captioner)
    rows, failures = caption_images(images[:2], str(captioner), GENERATION, device="cpu")
    assert len(rows) == 2
    assert not failures


def test_captions_belong_to_the_memory_they_were_made_with(features: Path, captioner: Path, tmp_path: Path) -> None:
    remember(features, captioner)
    caption(features, captioner, tmp_path / "captions")
    remember(features, captioner, "val")
    with pytest.raises(FingerprintError, match="datastore"):
        caption(features, captioner, tmp_path / "captions")


def test_a_captioner_without_a_memory_is_told_how_to_get_one(features: Path, captioner: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"neighbors needs datastore.parquet, which is missing; write it with `captionlib build-datastore",
    ):
        caption(features, captioner, tmp_path / "captions")
    assert not (tmp_path / "captions").exists()


@pytest.mark.parametrize("damage", [lambda whole: whole[:100], lambda whole: whole[:4] + bytes(200) + whole[204:]])
def test_a_damaged_memory_is_told_so(
    damage: Callable[[bytes], bytes], features: Path, captioner: Path, tmp_path: Path
) -> None:
    remember(features, captioner)
    file = captioner / "datastore.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        CheckpointError,
        match=r"datastore.parquet is damaged .*; write it again with `captionlib build-datastore FEATURES -c",
    ):
        caption(features, captioner, tmp_path / "captions")


def test_training_again_forgets(features: Path, captioner: Path) -> None:
    remember(features, captioner)
    loaded = load_captioner(captioner)
    read_datastore_fingerprint(captioner, loaded)
    other = replace(loaded, fingerprint="another")
    with pytest.raises(
        CheckpointError, match=f"expected the datastore of captioner another, got that of {loaded.fingerprint}"
    ):
        read_datastore_fingerprint(captioner, other)
    config = CaptionerTrainingConfig(
        captioner=CaptionerConfig(hidden_size=8, embedding_size=8), training=TrainingConfig(epochs=1), min_count=1
    )
    train_captioner(features, captioner, config, device="cpu", overwrite=True, progress=False)
    assert not (captioner / "datastore.parquet").exists()


def test_a_captioner_that_learns_has_no_neighbours(features: Path, tmp_path: Path) -> None:
    config = CaptionerTrainingConfig(best_by="cider", decoding=GENERATION.decoding, min_count=1)
    with pytest.raises(ConfigError, match="neighbors: expected 0 while a captioner learns, got 3"):
        train_captioner(features, tmp_path / "captioner", config, device="cpu", progress=False)


def test_the_commands_say_what_was_done(features: Path, captioner: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(captionlib, ["build-datastore", str(features), "-c", str(captioner), "--no-progress"])
    assert run.exit_code == 0, run.output
    assert f"{captioner}: 5 images in the datastore" in run.output
    shown = CliRunner().invoke(captionlib, ["inspect", str(captioner)])
    assert "5 images" in shown.output
