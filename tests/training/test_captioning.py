from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from captionlib.data.datasets import create_dataset
from captionlib.data.schemas import features_schema
from captionlib.data.shard_writer import write_shard
from captionlib.data.shards import ShardedDataset
from captionlib.errors import DatasetError
from captionlib.models.captioner import CaptionerConfig
from captionlib.models.checkpoints import load_captioner
from captionlib.models.decoding import Decoder, DecodingConfig
from captionlib.training.captioning import CaptioningConfig, train_captioner
from captionlib.training.loop import LoopConfig

WORDS = ["zero", "one", "two", "three"]
CONFIG = CaptioningConfig(
    captioner=CaptionerConfig(hidden_size=16, word_size=16, dropout=0.1),
    training=LoopConfig(epochs=30, optimizer="adam", learning_rate=0.03, seed=3),
    min_count=1,
    batch_images=8,
)


@pytest.fixture
def features(tmp_path: Path) -> ShardedDataset:
    """64 images of four kinds, told apart by their features; the sentence says the kind."""
    draw = np.random.default_rng(0)
    dataset = create_dataset(
        tmp_path / "features",
        "features",
        features_schema(4, "float16"),
        config={"encoder": {"model": "none", "shape": [4]}},
        shards=2,
    )
    for shard in range(2):
        kinds = draw.integers(0, 4, 32)
        rows = [
            {
                "image_id": f"{shard}-{number}",
                "uri": "",
                "split": "val" if number % 4 == 0 else "train",
                "captions": [f"this is {WORDS[kind]}", f"it is a {WORDS[kind]} again"],
                "features": (5 * np.eye(4)[kind] + draw.normal(0, 0.1, 4)).astype(np.float16),
            }
            for number, kind in enumerate(kinds)
        ]
        with write_shard(dataset, shard, 32) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
    dataset.finish()
    return dataset


def train(
    features: ShardedDataset, output: Path, config: CaptioningConfig = CONFIG, **options: Any
) -> list[dict[str, float]]:
    return train_captioner(features.folder.uri, output, config, device="cpu", progress=False, **options)


def test_learns_to_say_what_it_sees(features: ShardedDataset, tmp_path: Path) -> None:
    history = train(features, tmp_path / "captioner")
    # Of an image's two sentences, ten tokens with their ENDs, which it is is a coin's toss: 2^(2 / 10) is the best.
    assert 2**0.2 <= history[-1]["perplexity"] < 1.25
    assert history[0]["perplexity"] > 2 * history[-1]["perplexity"]
    captioner = load_captioner(tmp_path / "captioner")
    decoder = Decoder(captioner.model, DecodingConfig(beam_width=3))
    for kind, word in enumerate(WORDS):
        best = decoder.decode(5 * torch.eye(4)[kind : kind + 1])[0][0]
        assert word in captioner.vocabulary.decode(best.words)
    assert captioner.encoder == {"model": "none", "shape": [4]}
    assert (tmp_path / "captioner" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "captioner" / "metrics.jsonl").read_text().count("\n") == len(history)


def test_the_vocabulary_is_counted_on_train_only(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, train_splits=("val",), validation_splits=("train",), training=LoopConfig(epochs=1))
    train(features, tmp_path / "captioner", config)
    vocabulary = load_captioner(tmp_path / "captioner").vocabulary
    assert vocabulary.sentences == 2 * 16


def test_the_same_seed_gives_the_same_weights(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, training=LoopConfig(epochs=2))
    states = []
    for name in ("one", "two"):
        train(features, tmp_path / name, config)
        states.append(load_captioner(tmp_path / name).model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_split_without_sentences_is_refused_before_training(features: ShardedDataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected sentences in split dev, got none"):
        train(features, tmp_path / "captioner", replace(CONFIG, validation_splits=("dev",)))
    assert not (tmp_path / "captioner" / "config.json").exists()


def test_another_configuration_is_refused_unless_told_to_overwrite(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, training=LoopConfig(epochs=1))
    train(features, tmp_path / "captioner", config)
    other = replace(config, captioner=replace(config.captioner, hidden_size=8))
    with pytest.raises(DatasetError, match=r"captioner\.hidden_size: there 16, now 8"):
        train(features, tmp_path / "captioner", other)
    train(features, tmp_path / "captioner", other, overwrite=True)
    assert load_captioner(tmp_path / "captioner").config.hidden_size == 8


def test_a_map_of_vectors_is_refused(tmp_path: Path) -> None:
    dataset = create_dataset(
        tmp_path / "maps", "features", features_schema(8, "float16"), config={"encoder": {"shape": [4, 2]}}, shards=0
    )
    dataset.finish()
    with pytest.raises(DatasetError, match="expected one vector an image, got a map of"):
        train(dataset, tmp_path / "captioner")
