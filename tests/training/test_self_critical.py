import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from captionlib.config import load_config
from captionlib.data.batches.captions import CaptionBatch, CaptionBatches
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import END, Vocabulary
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import Captioner, CaptionerConfig
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.training import self_critical
from captionlib.training.caption_objective import CaptioningObjective, CaptionSaver
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from captionlib.training.objective import BatchLoss
from captionlib.training.self_critical import (
    SelfCriticalBatch,
    SelfCriticalConfig,
    SelfCriticalObjective,
)
from jobs.train_captioner import command
from tests.models.tiny_captioners import CONFIGS, build

Baseline = Literal["leave_one_out", "greedy"]
FIRST = CaptionerTrainingConfig(
    captioner=CaptionerConfig(hidden_size=16, embedding_size=16, dropout=0.1),
    training=TrainingConfig(epochs=3, optimizer="adam", learning_rate=0.03),
    min_count=1,
    batch_images=8,
    decoding=DecodingConfig(max_tokens=8),
)
SECOND = replace(
    FIRST, objective="self_critical", init_from="first", training=replace(FIRST.training, epochs=10, patience=None)
)


def train(features: ShardedDataset, output: Path, config: CaptionerTrainingConfig) -> list[dict[str, float]]:
    return train_captioner(features.folder.uri, output, config, device="cpu", progress=False)


@pytest.fixture
def first(features: ShardedDataset, tmp_path: Path) -> str:
    """A captioner that has learned by cross-entropy, though not for long."""
    train(features, tmp_path / "first", FIRST)
    return str(tmp_path / "first")


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_the_reward_rises(features: ShardedDataset, tmp_path: Path, first: str, baseline: Baseline) -> None:
    settings = SelfCriticalConfig(baseline=baseline)
    history = train(features, tmp_path / "second", replace(SECOND, init_from=first, self_critical=settings))
    rewards = [row["reward"] for row in history]
    assert rewards[-1] > 1.3 * rewards[0]
    second = load_captioner(tmp_path / "second")
    assert second.provenance["objective"] == "self_critical"
    assert load_captioner(first).provenance["objective"] == "cross_entropy"
    assert second.training["resolved"]["self_critical"]["baseline"] == baseline
    assert (tmp_path / "second" / "metrics.jsonl").read_text().count('"reward": ') == len(history)


def test_the_command_starts_the_second_stage_from_the_first(
    features: ShardedDataset, tmp_path: Path, first: str
) -> None:
    words = [features.folder.uri, "-o", str(tmp_path / "second"), "--device", "cpu", "--no-progress"]
    words += ["--config", str(Path(__file__).parents[2] / "configs" / "train-captioner/flickr8k-self-critical.yaml")]
    words += ["--set", "random_crop=0", "--set", "horizontal_flip=false"]
    words += ["--set", "training.epochs=1", "--set", "best_by=perplexity"]
    alone = CliRunner().invoke(command, words)
    assert isinstance(alone.exception, ConfigError)
    result = CliRunner().invoke(command, [*words, "--init-from", first])
    assert result.exit_code == 0
    assert "after epoch 1 of 1" in result.output
    assert load_captioner(tmp_path / "second").provenance["init_from"]["checkpoint"] == first


@pytest.mark.parametrize(("died_at", "precision"), [(2, "float32"), (8, "bfloat16")])
def test_a_killed_run_goes_on_bit_for_bit(
    features: ShardedDataset,
    tmp_path: Path,
    first: str,
    died_at: int,
    precision: Literal["float32", "bfloat16"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = replace(SECOND.training, epochs=2, checkpoint_interval_seconds=0, ema_decay=0.9, precision=precision)
    config = replace(SECOND, init_from=first, training=training, self_critical=SelfCriticalConfig(dropout=0.3))
    history = train(features, tmp_path / "undisturbed", config)
    whole, steps = SelfCriticalObjective.loss, 0

    def dies(objective: SelfCriticalObjective, batch: SelfCriticalBatch) -> BatchLoss:
        nonlocal steps
        steps += 1
        if steps == died_at:
            raise RuntimeError("the machine dies")
        return whole(objective, batch)

    monkeypatch.setattr(SelfCriticalObjective, "loss", dies)
    with pytest.raises(RuntimeError, match="dies"):
        train(features, tmp_path / "killed", config)
    for expected, got in zip(history, train(features, tmp_path / "killed", config), strict=True):
        assert all(expected[name] == got[name] for name in ("loss", "reward", "perplexity"))
    undisturbed, resumed = (load_captioner(tmp_path / name).model.state_dict() for name in ("undisturbed", "killed"))
    assert all(torch.equal(values, resumed[name]) for name, values in undisturbed.items())


def objective_of(
    model: Captioner,
    features: ShardedDataset,
    settings: SelfCriticalConfig,
    references: Sequence[list[list[int]]],
    max_tokens: int = 6,
) -> SelfCriticalObjective:
    vocabulary = Vocabulary.from_captions(["a b c d e f g"], 1)
    batches = CaptionBatches(features, ["train"], vocabulary.encode, 8)
    captioning = CaptioningObjective(model, batches, batches, CaptionSaver(vocabulary, {}, {}))
    return SelfCriticalObjective(captioning, settings, references, max_tokens)


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_the_loss_of_two_sentences_by_hand(
    features: ShardedDataset, monkeypatch: pytest.MonkeyPatch, baseline: Baseline
) -> None:
    model = Captioner(CaptionerConfig("rnn", hidden_size=1, embedding_size=1), feature_size=3, vocabulary_size=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.output.bias.copy_(torch.tensor([1 / 8, 1 / 32, 1 / 2, 1 / 4, 3 / 32]).log())
    places = iter([torch.tensor([2, 2]), torch.tensor([3, END])])  # the first is cut off before its END
    monkeypatch.setattr(self_critical, "sample_tokens", lambda *_: next(places))
    settings = SelfCriticalConfig(2, baseline, include_end_token=False)
    objective = objective_of(model, features, settings, [[[2, 3]], [[4]]], max_tokens=2)
    batch = CaptionBatch(np.zeros((1, 3), np.float32), [[2, 3]], np.array([0]))
    loss = objective.loss(SelfCriticalBatch(batch, seed=0, epoch=0))
    high, low = 5.0, 10 / 4 * math.sqrt(0.5) * math.exp(-1 / 72)  # as in the test of the reward by hand
    assert (loss.size, loss.drawn, loss.reward) == (4, 2, pytest.approx(high + low))
    greedy = 10 / 4 / (2 * math.sqrt(2))  # the likeliest word twice: one of them is right
    baselines = (low, high) if baseline == "leave_one_out" else (greedy, greedy)
    expected = (high - baselines[0]) * math.log(2 * 4) + (low - baselines[1]) * math.log(2 * 8)
    assert loss.mean.item() == pytest.approx(expected / 4, rel=1e-5)
    assert loss.total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [*CONFIGS, replace(CONFIGS[1], attention_size=4)], ids=str)
def test_what_is_learned_is_what_forward_says_of_the_sentences_drawn(
    features: ShardedDataset, config: CaptionerConfig
) -> None:
    model = build(config, seed=1)
    objective = objective_of(model, features, SelfCriticalConfig(2), [[[2, 3, 4]], [[4, 5]]], max_tokens=8)
    shape = (3, 7, 3) if config.attention_size else (3, 3)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    batch = SelfCriticalBatch(CaptionBatch(images, [[2], [3], [4]], np.arange(3)), 0, 0)
    drawn = objective._draw(batch)
    written = pad_sentences([[token for token in tokens if token != END] for tokens in drawn.written])
    expected = model(torch.from_numpy(images), written, torch.arange(3).repeat_interleave(2))
    for sentence, tokens in enumerate(drawn.written):
        of_tokens = expected.log_probs[expected.sentences == sentence][: len(tokens)]  # no END where it was cut off
        torch.testing.assert_close(drawn.log_probs[drawn.sentences == sentence], of_tokens)


@pytest.mark.parametrize(
    ("config", "shape"),
    [(CONFIGS[0], [3]), (replace(CONFIGS[1], attention_size=4), [7, 3])],
    ids=["image_state", "attention"],
)
def test_what_is_drawn_goes_with_the_epoch_and_the_image_and_not_with_its_batch(
    features: ShardedDataset, config: CaptionerConfig, shape: list[int]
) -> None:
    model = build(config, seed=1)
    objective = objective_of(model, features, SelfCriticalConfig(3), [[[2, 3, 4]], [[4, 5]]])
    images = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    sentences = [[2, 3, 4], [4, 5], [2], [3], [5, 6], [6]]

    def loss(first: int, last: int, epoch: int = 0) -> BatchLoss:
        batch = CaptionBatch(images[first:last], sentences[first:last], np.arange(last - first))
        return objective.loss(SelfCriticalBatch(batch, 0, epoch))

    whole, parts = loss(0, 6), (loss(0, 2), loss(2, 6))
    assert whole.reward > 0
    assert whole.size == sum(part.size for part in parts)
    assert whole.reward == pytest.approx(sum(part.reward for part in parts))
    assert whole.total == pytest.approx(sum(part.total for part in parts), rel=1e-4)
    assert loss(0, 6, epoch=1).size != whole.size


def test_what_self_critical_training_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="second stage; expected init_from"):
        CaptionerTrainingConfig(objective="self_critical")
    with pytest.raises(ConfigError, match=r"label_smoothing: expected 0\.0 with objective self_critical"):
        replace(SECOND, label_smoothing=0.1)
    with pytest.raises(ConfigError, match="at least 2 for baseline others, got 1"):
        load_config(CaptionerTrainingConfig, None, ["self_critical.samples=1"])
