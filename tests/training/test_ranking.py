import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from captionlib.data.arrays import numpy_to_vectors, vectors_to_numpy
from captionlib.data.batches.captions import CaptionBatch
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError, DatasetError
from captionlib.evaluation.retrieval import score_ranker
from captionlib.models.checkpoints.checkpoint import load_ranker
from captionlib.models.inference.embedding import EmbeddingConfig
from captionlib.models.rankers.ranker import RankerConfig
from captionlib.training.loop import TrainingConfig
from captionlib.training.ranking import RankerTrainingConfig, RankingObjective, sample_captions, train_ranker
from jobs.cli import captionlib
from pipelines.embed_images import embed_images
from pipelines.run import RunConfig
from tests.training.processes import TrainingRun

KINDS = [f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("ball", "box", "car", "dog")]
CONFIG = RankerTrainingConfig(
    ranker=RankerConfig(hidden_size=16, embedding_size=16, joint_embedding_size=16, feature_dropout=0.0, dropout=0.1),
    training=TrainingConfig(epochs=16, optimizer="adam", learning_rate=0.02, clip_value=None, seed=4),
    min_count=1,
    batch_images=12,
    warmup_epochs=3,
)


@pytest.fixture
def features(tmp_path: Path) -> ShardedDataset:
    """48 training images, four of each kind, and 12 for validation; features and captions identify the kind."""
    generator = np.random.default_rng(0)
    dataset = create_dataset(
        tmp_path / "features",
        "features",
        features_schema(12, "float16"),
        config={"encoder": {"model": "none", "shape": [12]}},
        shards=5,
    )
    for shard in range(5):
        rows = [
            {
                "image_id": f"{shard}-{kind}",
                "uri": "",
                "split": "train" if shard else "val",
                "captions": [f"a {name}", f"this is the {name} again", f"{name}"][: 3 if kind % 2 else 2],
                "features": (np.eye(12)[kind] + generator.normal(0, 0.05, 12)).astype(np.float16),
            }
            for kind, name in enumerate(KINDS)
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
    dataset.finish()
    return dataset


def train(
    features: ShardedDataset, output: Path, config: RankerTrainingConfig = CONFIG, **options: Any
) -> list[dict[str, float]]:
    return train_ranker(features.folder.uri, output, config, device="cpu", progress=False, **options)


@pytest.mark.parametrize(
    ("loss", "encoder", "sentences"),
    [("contrastive", "gru", 1), ("contrastive", "mean", 0), ("max_margin", "lstm", 2), ("hard_negative", "mean", 1)],
)
def test_learns_to_match_images_and_captions(
    features: ShardedDataset, tmp_path: Path, loss: Any, encoder: Any, sentences: int
) -> None:
    config = replace(
        CONFIG, loss=loss, captions_per_image=sentences, ranker=replace(CONFIG.ranker, sentence_encoder=encoder)
    )
    history = train(features, tmp_path / "ranker", config)
    assert history[0]["mean_recall"] < max(row["mean_recall"] for row in history)
    ranker = load_ranker(tmp_path / "ranker")
    scores = score_ranker(ranker, features, ["val"])
    assert (scores.images, scores.references) == (12, 30)
    assert scores.mean_recall > 0.95
    assert scores.mean_recall == pytest.approx(max(row["mean_recall"] for row in history))
    assert (
        ranker.encode_sentences(["a blue car"]) @ ranker.encode_images(np.eye(12, dtype=np.float32)).T
    ).argmax() == KINDS.index("blue car")
    assert (tmp_path / "ranker" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_maps_are_averaged_over_positions(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, epochs=2))
    maps = to_maps(features, tmp_path / "maps")
    histories = train(maps, tmp_path / "of-maps", config), train(features, tmp_path / "of-means", config)
    assert [row["loss"] for row in histories[0]] == [row["loss"] for row in histories[1]]
    ranker, other = load_ranker(tmp_path / "of-maps"), load_ranker(tmp_path / "of-means")
    assert score_ranker(ranker, maps, ["val"]) == score_ranker(other, features, ["val"])
    embed_images(
        maps.folder.uri, tmp_path / "of-maps", tmp_path / "embeddings", EmbeddingConfig(), run=RunConfig(progress=False)
    )
    vectors = np.array(open_dataset(tmp_path / "embeddings").read(0)["embedding"].to_pylist())
    assert np.allclose(vectors, other.encode_images(read_vectors(features, 0)), atol=1e-3)


def to_maps(features: ShardedDataset, folder: Path) -> ShardedDataset:
    """Writes maps of two positions: twice the vector, and zeros."""
    config = {"encoder": {"model": "none", "shape": [2, 12]}}
    schema = features_schema(24, "float16")
    maps = create_dataset(folder, "features", schema, config=config, shards=features.shards)
    for shard in range(features.shards):
        vectors = read_vectors(features, shard)
        column = numpy_to_vectors(np.concatenate([2 * vectors, 0 * vectors], 1))
        rows = features.read(shard)
        with write_shard(maps, shard, rows.num_rows) as writer:
            writer.write(
                rows.set_column(rows.schema.names.index("features"), schema.field("features"), column)
                .combine_chunks()
                .to_batches()[0]
            )
    maps.finish()
    return maps


def read_vectors(features: ShardedDataset, shard: int) -> npt.NDArray[np.floating]:
    return vectors_to_numpy(features.read(shard)["features"])


def test_crashed_run_resumes_bit_for_bit(
    features: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        CONFIG,
        loss="hard_negative",
        warmup_epochs=1,
        training=replace(CONFIG.training, epochs=3, checkpoint_interval_seconds=0),
    )
    train(features, tmp_path / "uninterrupted", config)
    steps = 0
    plain = RankingObjective.loss

    def crash(self: RankingObjective, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise RuntimeError("crash")
        return plain(self, batch)

    monkeypatch.setattr(RankingObjective, "loss", crash)
    with pytest.raises(RuntimeError, match="crash"):
        train(features, tmp_path / "crashed", config)
    train(features, tmp_path / "crashed", config)
    assert steps > 7
    weights = [load_ranker(tmp_path / name).model.state_dict() for name in ("uninterrupted", "crashed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_processes_train_one_ranker(features: ShardedDataset, tmp_path: Path) -> None:
    arguments = ["train-ranker", features.folder.uri, "-o", str(tmp_path / "ranker"), "--device", "cpu"]
    overrides = ["ranker.sentence_encoder=mean", "min_count=1", "batch_images=10", "training.epochs=8"]
    for override in (*overrides, "training.learning_rate=0.02"):
        arguments += ["--set", override]
    output = TrainingRun([*arguments, "--no-progress"], tmp_path / "log", processes=2).finish()
    assert output.count("mean recall") == 1  # only one process reports
    assert score_ranker(load_ranker(tmp_path / "ranker"), features, ["val"]).mean_recall > 0.9


def test_only_the_contrastive_loss_learns_the_temperature(features: ShardedDataset, tmp_path: Path) -> None:
    short = replace(CONFIG, training=replace(CONFIG.training, epochs=1))
    for loss, moves in (("contrastive", True), ("max_margin", False)):
        train(features, tmp_path / loss, replace(short, loss=loss))
        learned = load_ranker(tmp_path / loss).model.log_temperature.exp().item()
        assert (learned != pytest.approx(0.07)) is moves


def test_captions_are_sampled_for_each_image() -> None:
    batch = CaptionBatch(np.eye(3, dtype=np.float32), [[1], [2], [3], [4], [5]], np.array([0, 0, 0, 1, 2]))
    seen = set()
    for seed in range(30):
        sampled = sample_captions(batch, 2, np.random.default_rng(seed))
        assert sampled.image_of_caption.tolist() == [0, 0, 1, 2]
        for sentence, owner in zip(sampled.sentences, sampled.image_of_caption, strict=True):
            assert batch.image_of_caption[sentence[0] - 1] == owner
        seen |= {sentence[0] for sentence in sampled.sentences}
    assert seen == {1, 2, 3, 4, 5}
    assert sample_captions(batch, 0, np.random.default_rng(0)) is batch


def test_rejects_another_configuration(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, training=TrainingConfig(epochs=1))
    train(features, tmp_path / "ranker", config)
    with pytest.raises(DatasetError, match=r"margin: was 0.2, now 0.3"):
        train(features, tmp_path / "ranker", replace(config, margin=0.3))


def test_rejects_split_without_captions_before_training(features: ShardedDataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected captions in split other, got none"):
        train(features, tmp_path / "ranker", replace(CONFIG, validation_splits=("other",)))
    train(features, tmp_path / "ranker", replace(CONFIG, training=TrainingConfig(epochs=1)))
    with pytest.raises(DatasetError, match="no references in split test; its splits are train, val"):
        score_ranker(load_ranker(tmp_path / "ranker"), features, ["test"])


@pytest.mark.parametrize("values", [{"batch_images": 1}, {"margin": 0}, {"warmup_epochs": -1}])
def test_rejects_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))}: Input should be"):
        RankerTrainingConfig(**values)


def test_commands_train_and_report_recalls(features: ShardedDataset, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return CliRunner().invoke(captionlib, [*arguments, "--device", "cpu"], catch_exceptions=False).output

    ranker, folder = str(tmp_path / "ranker"), str(tmp_path / "features")
    sets = ["ranker.sentence_encoder=mean", "min_count=1", "batch_images=12", "training.epochs=2"]
    text = run("train-ranker", folder, "-o", ranker, "--no-progress", *[f"--set={value}" for value in sets])
    assert text.startswith(f"{ranker}: mean recall ")
    text = run("evaluate", folder, "--ranker", ranker, "--split", "val", "-o", str(tmp_path / "scores"))
    expected = score_ranker(load_ranker(ranker), open_dataset(folder), ["val"])
    assert text.splitlines()[0] == f"{ranker}: 12 images, 30 references"
    assert f"{expected.text_to_image.recall_at_5:.1%}" in text.splitlines()[3]
    written = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert written["image_to_text"]["mean_rank"] == expected.image_to_text.mean_rank
    with pytest.raises(DatasetError, match="expected a dataset of kind captions, got features"):
        run("evaluate", folder)
