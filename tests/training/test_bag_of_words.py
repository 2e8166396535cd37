from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from captionlib.config import load_config
from captionlib.data.batches.captions import CaptionBatch, CaptionBatches
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import UNKNOWN, Vocabulary
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.training.caption_objective import BagOfWordsObjective
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from jobs.train_captioner import command
from tests.models import tiny_captioners
from tests.models.tiny_captioners import CONFIGS, build

FIRST = CaptionerTrainingConfig(
    captioner=CaptionerConfig(hidden_size=16, embedding_size=16, dropout=0.1, image_input="initial_state"),
    training=TrainingConfig(epochs=5, optimizer="adam", learning_rate=0.03),
    objective="bag_of_words",
    min_count=1,
    batch_images=8,
)


def train(features: ShardedDataset, output: Path, config: CaptionerTrainingConfig) -> list[dict[str, float]]:
    return train_captioner(features.folder.uri, output, config, device="cpu", progress=False)


@pytest.mark.parametrize("config", CONFIGS)
def test_word_probability_is_that_of_the_first_word_of_a_caption(config: CaptionerConfig) -> None:
    model, images = build(config, 0), tiny_captioners.features(3, 0)
    with torch.no_grad():
        predicted = model.predict_bag_of_words(images)
        for word in range(2, 9):
            scores = model(images, torch.tensor([[word]] * 3), torch.arange(3))
            firsts = torch.stack([scores.log_probs[scores.sentences == image][0] for image in range(3)])
            torch.testing.assert_close(predicted[:, word], firsts)
    torch.testing.assert_close(predicted.exp().sum(1), torch.ones(3))


def objective_of(features: ShardedDataset, config: CaptionerConfig) -> BagOfWordsObjective:
    vocabulary = Vocabulary.from_captions(["a b c d e f g"], 1)
    batches = CaptionBatches(features, ["train"], vocabulary.encode, 8)
    return BagOfWordsObjective(build(config, 0), batches, batches, lambda *_: None)


def test_loss_covers_each_known_word_of_each_caption(features: ShardedDataset) -> None:
    objective = objective_of(features, CONFIGS[1])
    images = tiny_captioners.features(2, 0)
    batch = CaptionBatch(images.numpy(), [[3, UNKNOWN, 4], [3], [5, 5]], np.array([1, 1, 0]))
    expected = objective.model.predict_bag_of_words(images)[[1, 1, 1, 0, 0], [3, 4, 3, 5, 5]]
    loss = objective.loss(batch)
    assert loss.size == 5
    assert loss.total == pytest.approx(-expected.sum().item())
    assert loss.mean.item() == pytest.approx(-expected.mean().item())


def test_batch_without_known_words_has_no_gradient(features: ShardedDataset) -> None:
    objective = objective_of(features, CONFIGS[1])
    loss = objective.loss(CaptionBatch(tiny_captioners.features(1, 0).numpy(), [[UNKNOWN], []], np.array([0, 0])))
    loss.mean.backward()
    assert (loss.total, loss.size, loss.mean.item()) == (0, 0, 0)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in objective.model.parameters())


def test_word_perplexity_falls_and_captioning_starts_from_the_checkpoint(
    features: ShardedDataset, tmp_path: Path
) -> None:
    history = train(features, tmp_path / "first", FIRST)
    # Two captions have eight words: the word for the image's kind twice, "is" twice, and "this", "it", "a" and "again".
    best = np.exp(-(4 * np.log(2 / 8) + 4 * np.log(1 / 8)) / 8)
    assert history[0]["word_perplexity"] > 1.2 * best
    assert history[-1]["word_perplexity"] == pytest.approx(best, rel=0.05)
    first = load_captioner(tmp_path / "first")
    assert first.provenance["objective"] == "bag_of_words"
    longer = replace(FIRST.training, epochs=12)
    second = replace(FIRST, objective="cross_entropy", init_from=str(tmp_path / "first"), training=longer)
    history = train(features, tmp_path / "second", second)
    assert history[-1]["perplexity"] < 1.3  # the lowest possible value is 2^(2 / 10) = 1.15; see test_captioning.py
    assert load_captioner(tmp_path / "second").provenance["init_from"]["fingerprint"] == first.fingerprint


def test_command_reports_word_perplexity(features: ShardedDataset, tmp_path: Path) -> None:
    words = [features.folder.uri, "-o", str(tmp_path / "first"), "--device", "cpu", "--no-progress"]
    words += ["--set", "objective=bag_of_words", "--set", "training.epochs=2", "--set", "min_count=1"]
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    assert "word_perplexity" in result.output
    assert (tmp_path / "first" / "curves.png").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("label_smoothing=0.1", "label_smoothing: expected 0 with objective bag_of_words, got 0.1"),
        ("best_by=cider", "best_by: expected perplexity with objective bag_of_words, got cider"),
    ],
)
def test_rejects_options_of_other_objectives(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CaptionerTrainingConfig, None, ["objective=bag_of_words", override])
