"""Training of captioners with `cell: transformer`, from vectors and maps, by all objectives."""

from dataclasses import replace
from pathlib import Path

from captionlib.config import load_config
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.decoder import Decoder
from captionlib.recipes import find_recipe
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.self_critical import SelfCriticalConfig

SMALL = ["min_count=1", "batch_images=8", "captioner.hidden_size=16", "captioner.embedding_size=16"]
SMALL += ["captioner.heads=2", "captioner.dropout=0.1", "label_smoothing=0"]


def train(features: ShardedDataset, output: Path, config: CaptionerTrainingConfig) -> list[dict[str, float]]:
    return train_captioner(features.folder.uri, output, config, device="cpu", progress=False)


def test_recipe_learns_in_all_stages(features: ShardedDataset, tmp_path: Path) -> None:
    overrides = ["training.epochs=18", "training.learning_rate=0.01", "training.warmup_steps=10"]
    config = load_config(CaptionerTrainingConfig, find_recipe("transformer", "train-captioner"), [*SMALL, *overrides])
    first = replace(config, objective="bag_of_words", training=replace(config.training, epochs=3))
    words = train(features, tmp_path / "bag-of-words", first)
    assert words[-1]["word_perplexity"] < words[0]["word_perplexity"]
    second = replace(config, init_from=str(tmp_path / "bag-of-words"))
    history = train(features, tmp_path / "captioner", second)
    assert 2**0.2 <= history[-1]["perplexity"] < 1.3  # the best possible perplexity is 2^0.2
    captioner = load_captioner(tmp_path / "captioner")
    decoder = Decoder(captioner.model, vocabulary=captioner.vocabulary)
    assert len(decoder.decode(captioner.model.standardization.mean[None])[0]) == 1
    third = replace(
        config,
        objective="self_critical",
        init_from=str(tmp_path / "captioner"),
        self_critical=SelfCriticalConfig(samples=3, baseline="greedy"),
        training=replace(config.training, epochs=1, learning_rate=1e-4),
    )
    (row,) = train(features, tmp_path / "self-critical", third)
    assert row["reward"] > 1
