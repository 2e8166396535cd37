import dataclasses
from pathlib import Path

import numpy as np
import pytest

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import CheckpointError, DatasetError, FingerprintError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.checkpoints.checkpoint import load_ranker
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.inference.captioning import GenerationConfig
from captionlib.models.inference.embedding import SHARED_RANKERS, EmbeddingConfig
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.models.inference.shared_models import CheckpointVersion
from captionlib.models.rankers.ranker import RankerConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from captionlib.training.ranking import RankerTrainingConfig, train_ranker
from pipelines.embed_images import embed_images
from pipelines.extract_features import extract_features
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig
from tests.models.checkpoint_loads import count_checkpoint_loads
from tests.pipelines.conftest import write_manifest

QUIET = RunConfig(max_failure_ratio=0.5, progress=False)
EMBEDDING = EmbeddingConfig(encoder_batch_size=3)
GENERATION = GenerationConfig(DecodingConfig(beam_width=2, n_best=1), batch_size=3, encoder_batch_size=3)


def train_small_ranker(features: Path, output: Path, seed: int = 0) -> Path:
    config = RankerTrainingConfig(
        ranker=RankerConfig(hidden_size=8, embedding_size=8, joint_embedding_size=6),
        training=TrainingConfig(epochs=1, seed=seed),
        min_count=1,
        batch_images=4,
    )
    train_ranker(features, output, config, device="cpu", progress=False)
    return output


@pytest.fixture(scope="module")
def ranker(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small_ranker(extracted, tmp_path_factory.mktemp("trained") / "ranker")


@pytest.fixture(scope="module")
def captioner(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CaptionerTrainingConfig(
        captioner=CaptionerConfig(hidden_size=8, embedding_size=8), training=TrainingConfig(epochs=1), min_count=1
    )
    folder = tmp_path_factory.mktemp("trained") / "captioner"
    train_captioner(extracted, folder, config, device="cpu", progress=False)
    return folder


def embed(source: Path | str, ranker: Path, output: Path, run: RunConfig = QUIET) -> ShardedDataset:
    embed_images(source, ranker, output, EMBEDDING, device="cpu", run=run)
    return open_dataset(output, "embeddings").require_complete()


def vectors(dataset: ShardedDataset) -> dict[str, list[float]]:
    tables = [dataset.read(shard).to_pylist() for shard in range(dataset.shards)]
    return {row["image_id"]: row["embedding"] for table in tables for row in table}


def test_embeddings_equal_the_rankers_unit_vectors(features: Path, ranker: Path, tmp_path: Path) -> None:
    dataset = embed(features, ranker, tmp_path / "embeddings")
    assert str(dataset.schema.field("embedding").type) == "fixed_size_list<item: halffloat>[6]"
    embedded, loaded = vectors(dataset), load_ranker(ranker)
    source = open_dataset(features)
    rows = [row for shard in range(source.shards) for row in source.read(shard).to_pylist()]
    assert list(embedded) == [row["image_id"] for row in rows]
    expected = loaded.encode_images(np.array([row["features"] for row in rows], np.float32))
    np.testing.assert_allclose(np.array(list(embedded.values())), expected, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(list(embedded.values()), axis=1), 1, atol=2e-3)


def test_images_and_features_give_the_same_embeddings(
    manifest: ShardedDataset, features: Path, ranker: Path, tmp_path: Path
) -> None:
    from_features = embed(features, ranker, tmp_path / "embeddings")
    from_images = embed(manifest.folder.uri, ranker, tmp_path / "embeddings-from-images")
    assert vectors(from_features) == vectors(from_images)
    assert from_images.compute_totals().failures == 2


def test_generate_captions_writes_the_same_embeddings(
    manifest: ShardedDataset, features: Path, captioner: Path, ranker: Path, tmp_path: Path
) -> None:
    alone = embed(manifest.folder.uri, ranker, tmp_path / "alone")
    generate_captions(
        manifest.folder.uri,
        captioner,
        tmp_path / "captions",
        GENERATION,
        ranker=ranker,
        embeddings=tmp_path / "combined",
        device="cpu",
        run=QUIET,
    )
    combined = open_dataset(tmp_path / "combined", "embeddings").require_complete()
    captions = open_dataset(tmp_path / "captions", "captions").require_complete()
    assert combined.fingerprint == alone.fingerprint
    assert vectors(combined) == vectors(alone)
    assert (combined.compute_totals().rows, combined.compute_totals().failures) == (captions.compute_totals().rows, 2)
    assert combined.verify() == captions.verify() == []


def test_a_lost_shard_of_embeddings_is_computed_again(
    features: Path, captioner: Path, ranker: Path, tmp_path: Path
) -> None:
    def run() -> None:
        generate_captions(
            features,
            captioner,
            tmp_path / "captions",
            GENERATION,
            ranker=ranker,
            embeddings=tmp_path / "embeddings",
            device="cpu",
            run=QUIET,
        )

    run()
    embeddings = open_dataset(tmp_path / "embeddings")
    before = vectors(embeddings)
    embeddings.remove_marker(1)
    assert not embeddings.is_complete()
    run()
    assert vectors(embeddings.require_complete()) == before
    assert open_dataset(tmp_path / "captions").require_complete().verify() == []


def test_bundles_that_run_twice_write_the_same(features: Path, ranker: Path, tmp_path: Path) -> None:
    once = embed(features, ranker, tmp_path / "once")
    twice = dataclasses.replace(QUIET, beam_options=("--direct_runner_bundle_repeat=1",))
    again = embed(features, ranker, tmp_path / "twice", twice)
    for shard in range(once.shards):
        assert Path(once.get_part_path(shard)).read_bytes() == Path(again.get_part_path(shard)).read_bytes()


def test_another_ranker_into_the_same_folder_is_refused(features: Path, ranker: Path, tmp_path: Path) -> None:
    embed(features, ranker, tmp_path / "embeddings")
    other = train_small_ranker(features, tmp_path / "other", seed=1)
    with pytest.raises(FingerprintError, match="ranker: was"):
        embed(features, other, tmp_path / "embeddings")
    embed(features, other, tmp_path / "embeddings", dataclasses.replace(QUIET, overwrite=True))


def test_features_of_another_encoder_are_refused(
    manifest: ShardedDataset,
    extracted: Path,
    ranker: Path,
    captioner: Path,
    tmp_path: Path,
    small_encoder: ExtractionConfig,
) -> None:
    encoder = dataclasses.replace(small_encoder.encoder, weights="random:7")
    other = dataclasses.replace(small_encoder, encoder=encoder)
    extract_features(manifest.folder.uri, tmp_path / "other", other, run=QUIET)
    with pytest.raises(CheckpointError, match="a different encoder than the ranker's"):
        embed(tmp_path / "other", ranker, tmp_path / "embeddings")
    other_ranker = train_small_ranker(tmp_path / "other", tmp_path / "other-ranker")
    with pytest.raises(CheckpointError, match="a different encoder than the ranker's"):
        generate_captions(
            extracted,
            captioner,
            tmp_path / "captions",
            GENERATION,
            ranker=other_ranker,
            embeddings=tmp_path / "embeddings",
            run=QUIET,
        )
    assert not (tmp_path / "embeddings").exists()
    assert not (tmp_path / "captions").exists()


def test_an_embeddings_dataset_is_not_a_source(features: Path, ranker: Path, tmp_path: Path) -> None:
    embed(features, ranker, tmp_path / "embeddings")
    with pytest.raises(DatasetError, match="expected a dataset of kind features or manifest, got embeddings"):
        embed(tmp_path / "embeddings", ranker, tmp_path / "more")


def test_a_ranker_that_was_replaced_is_rejected(ranker: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the model that the run started with"):
        SHARED_RANKERS.get(CheckpointVersion(str(ranker), "0" * 64), "cpu")


def test_embeddings_do_not_depend_on_the_other_images(
    features: Path, ranker: Path, tmp_path: Path, images: list[str]
) -> None:
    together = vectors(embed(features, ranker, tmp_path / "embeddings"))
    write_manifest(tmp_path / "alone", images[:1])
    alone = vectors(embed(tmp_path / "alone", ranker, tmp_path / "embeddings-alone"))
    np.testing.assert_allclose(alone["red.png"], together["red.png"], atol=1e-3)


def test_each_checkpoint_is_loaded_once(
    features: Path, captioner: Path, ranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = count_checkpoint_loads(monkeypatch)
    generate_captions(
        features,
        captioner,
        tmp_path / "captions",
        GENERATION,
        ranker=ranker,
        embeddings=tmp_path / "combined",
        device="cpu",
        run=QUIET,
    )
    assert loads == ["captioner", "ranker"]
    embed(features, ranker, tmp_path / "embeddings")
    assert loads == ["captioner", "ranker", "ranker"]
