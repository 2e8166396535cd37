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
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.training import self_critical
from captionlib.training.caption_objective import CaptioningObjective
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
    """A captioner trained briefly by cross-entropy."""
    train(features, tmp_path / "first", FIRST)
    return str(tmp_path / "first")


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_reward_rises(features: ShardedDataset, tmp_path: Path, first: str, baseline: Baseline) -> None:
    settings = SelfCriticalConfig(baseline=baseline)
    history = train(features, tmp_path / "second", replace(SECOND, init_from=first, self_critical=settings))
    rewards = [row["reward"] for row in history]
    assert rewards[-1] > 1.15 * rewards[0]
    second = load_captioner(tmp_path / "second")
    assert second.provenance["objective"] == "self_critical"
    assert load_captioner(first).provenance["objective"] == "cross_entropy"
    assert second.training["resolved"]["self_critical"]["baseline"] == baseline
    assert (tmp_path / "second" / "metrics.jsonl").read_text().count('"reward": ') == len(history)


def test_command_starts_from_the_first_stage(features: ShardedDataset, tmp_path: Path, first: str) -> None:
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


@pytest.mark.parametrize(("crash_step", "precision"), [(2, "float32"), (8, "bfloat16")])
def test_crashed_run_resumes_bit_for_bit(
    features: ShardedDataset,
    tmp_path: Path,
    first: str,
    crash_step: int,
    precision: Literal["float32", "bfloat16"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = replace(SECOND.training, epochs=2, checkpoint_interval_seconds=0, ema_decay=0.9, precision=precision)
    config = replace(SECOND, init_from=first, training=training, self_critical=SelfCriticalConfig(dropout=0.3))
    history = train(features, tmp_path / "uninterrupted", config)
    whole, steps = SelfCriticalObjective.loss, 0

    def crash(objective: SelfCriticalObjective, batch: SelfCriticalBatch) -> BatchLoss:
        nonlocal steps
        steps += 1
        if steps == crash_step:
            raise RuntimeError("crash")
        return whole(objective, batch)

    monkeypatch.setattr(SelfCriticalObjective, "loss", crash)
    with pytest.raises(RuntimeError, match="crash"):
        train(features, tmp_path / "crashed", config)
    for expected, got in zip(history, train(features, tmp_path / "crashed", config), strict=True):
        assert all(expected[name] == got[name] for name in ("loss", "reward", "perplexity"))
    uninterrupted, resumed = (
        load_captioner(tmp_path / name).model.state_dict() for name in ("uninterrupted", "crashed")
    )
    assert all(torch.equal(values, resumed[name]) for name, values in uninterrupted.items())


def objective_of(
    model: CaptionerNetwork,
    features: ShardedDataset,
    settings: SelfCriticalConfig,
    references: Sequence[list[list[int]]],
    max_tokens: int = 6,
) -> SelfCriticalObjective:
    vocabulary = Vocabulary.from_captions(["a b c d e f g"], 1)
    batches = CaptionBatches(features, ["train"], vocabulary.encode, 8)
    captioning = CaptioningObjective(model, batches, batches, lambda *_: None)
    return SelfCriticalObjective(captioning, settings, references, max_tokens)


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_loss_of_two_samples_matches_hand_computed_value(
    features: ShardedDataset, monkeypatch: pytest.MonkeyPatch, baseline: Baseline
) -> None:
    model = CaptionerNetwork(CaptionerConfig("rnn", hidden_size=1, embedding_size=1), feature_size=3, vocabulary_size=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.output.bias.copy_(torch.tensor([1 / 8, 1 / 32, 1 / 2, 1 / 4, 3 / 32]).log())
    # Two time steps of two samples. The first sample is truncated before END.
    sampled = iter([torch.tensor([2, 2]), torch.tensor([3, END])])
    monkeypatch.setattr(self_critical, "sample_tokens", lambda *_: next(sampled))
    settings = SelfCriticalConfig(2, baseline)
    objective = objective_of(model, features, settings, [[[2, 3]], [[4]]], max_tokens=2)
    batch = CaptionBatch(np.zeros((1, 3), np.float32), [[2, 3]], np.array([0]))
    loss = objective.loss(SelfCriticalBatch(batch, seed=0, epoch=0))
    # END alone has no weight, because it occurs in the references of both images. All other n-grams have equal weights.
    # The reference is (2, 3, END). Sample (2, 3) has both words and one of two bigrams, (2, END) has one of two words.
    length_penalty = math.exp(-1 / 72)
    high, low = 10 / 4 * (1 + math.sqrt(0.5)) * length_penalty, 10 / 4 * math.sqrt(0.5) * length_penalty
    assert (loss.size, loss.reward_count, loss.reward_total) == (4, 2, pytest.approx(high + low))
    greedy = 10 / 4 / (2 * math.sqrt(2)) * length_penalty  # the greedy caption is (2, 2), in which one word is correct
    baselines = (low, high) if baseline == "leave_one_out" else (greedy, greedy)
    expected = (high - baselines[0]) * math.log(2 * 4) + (low - baselines[1]) * math.log(2 * 8)
    assert loss.mean.item() == pytest.approx(expected / 4, rel=1e-5)
    assert loss.total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config", [*CONFIGS, replace(CONFIGS[1], attention_size=4)], ids=str)
def test_sampled_log_probs_equal_those_of_forward(features: ShardedDataset, config: CaptionerConfig) -> None:
    model = build(config, seed=1)
    objective = objective_of(model, features, SelfCriticalConfig(2), [[[2, 3, 4]], [[4, 5]]], max_tokens=8)
    shape = (3, 7, 3) if config.attention_size else (3, 3)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    batch = SelfCriticalBatch(CaptionBatch(images, [[2], [3], [4]], np.arange(3)), 0, 0)
    samples = objective._sample(batch)
    written = pad_sentences([[token for token in tokens if token != END] for tokens in samples.captions])
    expected = model(torch.from_numpy(images), written, torch.arange(3).repeat_interleave(2))
    for sentence, tokens in enumerate(samples.captions):
        of_tokens = expected.log_probs[expected.sentences == sentence][: len(tokens)]  # truncated samples have no END
        torch.testing.assert_close(samples.log_probs[samples.sentences == sentence], of_tokens)


@pytest.mark.parametrize(
    ("config", "shape"),
    [(CONFIGS[0], [3]), (replace(CONFIGS[1], attention_size=4), [7, 3])],
    ids=["image_state", "attention"],
)
def test_samples_depend_on_epoch_and_image_but_not_on_the_batch(
    features: ShardedDataset, config: CaptionerConfig, shape: list[int]
) -> None:
    model = build(config, seed=5)
    objective = objective_of(model, features, SelfCriticalConfig(3), [[[2, 3, 4]], [[4, 5]]])
    images = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    sentences = [[2, 3, 4], [4, 5], [2], [3], [5, 6], [6]]

    def loss(first: int, last: int, epoch: int = 0) -> BatchLoss:
        batch = CaptionBatch(images[first:last], sentences[first:last], np.arange(last - first))
        return objective.loss(SelfCriticalBatch(batch, 0, epoch))

    whole, parts = loss(0, 6), (loss(0, 2), loss(2, 6))
    assert whole.reward_total > 0
    assert whole.size == sum(part.size for part in parts)
    assert whole.reward_total == pytest.approx(sum(part.reward_total for part in parts))
    assert whole.total == pytest.approx(sum(part.total for part in parts), rel=1e-4)
    assert loss(0, 6, epoch=1).size != whole.size


def test_rejects_invalid_self_critical_configurations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_from: expected a captioner trained by cross_entropy"):
        CaptionerTrainingConfig(objective="self_critical")
    with pytest.raises(ConfigError, match=r"label_smoothing: expected 0 with objective self_critical"):
        replace(SECOND, label_smoothing=0.1)
    with pytest.raises(ConfigError, match="at least 2 for baseline leave_one_out, got 1"):
        load_config(CaptionerTrainingConfig, None, ["self_critical.samples=1"])
