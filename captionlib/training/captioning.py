"""Fits a captioner on `features/`: what people said of an image is to become likely."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captionlib import __version__
from captionlib.config import to_dict
from captionlib.data.batches import (
    CaptionBatch,
    CaptionBatches,
    feature_shape,
    mean_and_std,
    read_captions,
    sample_features,
)
from captionlib.data.datasets import open_dataset
from captionlib.data.vocabulary import Vocabulary
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioner import Captioner, CaptionerConfig, pad_sentences
from captionlib.models.checkpoints import save_checkpoint
from captionlib.models.devices import resolve_device
from captionlib.storage import Folder
from captionlib.training.curves import draw_curves
from captionlib.training.loop import LoopConfig, claim_folder, seed_everything, train

__all__ = ["CaptioningConfig", "CaptioningObjective", "train_captioner"]

_SAMPLE_IMAGES = 4096  # that principal components are found from


@dataclass(frozen=True)
class CaptioningConfig:
    """A captioner, its data, and how it is trained.

    Attributes:
        captioner: the network.
        training: the loop.
        train_splits: the rows to learn from; COCO's `restval` belongs to training.
        validation_splits: the rows that decide which epoch is best.
        min_count: words seen less often become UNKNOWN.
        max_words: longer sentences are cut while training.
        batch_images: images a batch, each with all of its sentences.
        window_megabytes: how much of the features is mixed at a time.
    """

    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    training: LoopConfig = field(default_factory=LoopConfig)
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    min_count: int = 5
    max_words: int = 30
    batch_images: int = 20
    window_megabytes: int = 512

    def __post_init__(self) -> None:
        for name in ("min_count", "max_words", "batch_images", "window_megabytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


class CaptioningObjective:
    """The log-probability of sentences given their images."""

    score_name = "perplexity"

    def __init__(
        self, model: Captioner, training: CaptionBatches, validation: CaptionBatches, steps: int, save: "_Save"
    ) -> None:
        self.model: Captioner = model
        self._training = training
        self._validation = validation
        self._steps = steps
        self._save = save
        self._device = next(model.parameters()).device

    def batches(self, seed: int, epoch: int) -> Iterator[CaptionBatch]:
        return self._training.epoch(seed, epoch)

    def steps(self) -> int:
        return self._steps

    def loss(self, batch: CaptionBatch) -> tuple[Tensor, float, int]:
        """Mean negative log-probability a token; see `Objective.loss`."""
        log_probs = self._log_probs(batch)
        total = -log_probs.sum()
        return total / len(log_probs), total.item(), len(log_probs)

    def validate(self) -> dict[str, float]:
        """Perplexity: exp(-sum ln p / sum (length + 1)), over the validation splits."""
        total, tokens = 0.0, 0
        for batch in self._validation.in_order():
            log_probs = self._log_probs(batch)
            total, tokens = total - log_probs.sum().item(), tokens + len(log_probs)
        return {"perplexity": float(torch.tensor(total / max(tokens, 1)).exp())}

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._save(output, self.model, training)
        draw_curves(output, training["history"])

    def _log_probs(self, batch: CaptionBatch) -> Tensor:
        scores = self.model(
            torch.from_numpy(batch.features).to(self._device),
            pad_sentences(batch.sentences).to(self._device),
            torch.from_numpy(batch.image_of_sentence).to(self._device),
        )
        log_probs: Tensor = scores.log_probs
        return log_probs


@dataclass(frozen=True)
class _Save:
    """Writes a captioner with all that captioning needs."""

    vocabulary: Vocabulary
    encoder: Mapping[str, Any]
    features_fingerprint: str

    def __call__(self, output: Folder, model: Captioner, training: dict[str, Any]) -> None:
        provenance = {
            "features": self.features_fingerprint,
            "captionlib": __version__,
            "torch": torch.__version__,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        save_checkpoint(output, model, self.vocabulary, self.encoder, provenance=provenance, training=training)


def train_captioner(
    features: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: CaptioningConfig,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a captioner on a features dataset, or goes on with a run that was stopped.

    Args:
        features: the features dataset.
        output: the run's folder: the best epoch's checkpoint, the metrics, the curves, and the state to go on from.
        config: the captioner and how it is trained.
        device: where.
        overwrite: replace a run of another configuration.
        progress: show a bar.

    Returns:
        One mapping an epoch, see `train`.

    Raises:
        DatasetError: the features are not complete, or have no sentences in a split that is needed.
    """
    dataset = open_dataset(features, "features").require_complete()
    if len(feature_shape(dataset)) != 1:
        raise DatasetError(
            f"{dataset.folder.uri}: expected one vector an image, got a map of {feature_shape(dataset)}; "
            "extract with pooling mean or max"
        )
    folder = Folder(output)
    claim_folder(folder, overwrite)
    target = resolve_device(device)
    vocabulary = Vocabulary.from_captions(read_captions(dataset, config.train_splits), config.min_count)
    validation = tuple(config.validation_splits)
    next(read_captions(dataset, validation))  # fails now rather than after the first epoch

    def encode(sentence: str) -> list[int]:
        return vocabulary.encode(sentence)[: config.max_words]

    window_bytes = config.window_megabytes << 20
    batches = CaptionBatches(dataset, config.train_splits, encode, config.batch_images, window_bytes)
    held_out = CaptionBatches(dataset, validation, encode, config.batch_images, window_bytes)
    seed_everything(config.training.seed)
    model = Captioner(config.captioner, feature_shape(dataset)[-1], len(vocabulary))
    if config.captioner.principal_components:
        model.set_components(torch.from_numpy(sample_features(dataset, config.train_splits, _SAMPLE_IMAGES)))
    elif config.captioner.standardise_features:
        model.set_standardisation(*map(torch.from_numpy, mean_and_std(dataset, config.train_splits)))
    model.initialise_bias(torch.from_numpy(vocabulary.log_frequencies()))
    objective = CaptioningObjective(
        model.to(target),
        batches,
        held_out,
        batches.count(),
        _Save(vocabulary, dataset.config["encoder"], dataset.fingerprint),
    )
    resolved = {"features": dataset.fingerprint, **to_dict(config)}
    return train(objective, config.training, folder, resolved, progress)
