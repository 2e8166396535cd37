"""Fits a ranker on `features/`: images and what people said of them are to find each other.

Of a spatial map a ranker sees the mean over its positions.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from captionlib.config import to_dict
from captionlib.data.batches.captions import CaptionBatch, CaptionBatches, feature_shape, mean_and_std, read_captions
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError
from captionlib.evaluation.retrieval import score_retrieval
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import save_ranker
from captionlib.models.checkpoints.folder import stamp_provenance
from captionlib.models.devices import resolve_device
from captionlib.models.rankers.ranker import Ranker, RankerConfig
from captionlib.storage.folders import Folder
from captionlib.training.curves import draw_curves
from captionlib.training.distributed import ProcessGroup, join_processes
from captionlib.training.loop import TrainingConfig, claim_folder, seed_everything, train
from captionlib.training.objective import BatchLoss
from captionlib.training.ranking_losses import contrastive_loss, max_margin_loss

__all__ = ["RankerTrainingConfig", "RankingBatch", "RankingObjective", "train_ranker"]


@dataclass(frozen=True)
class RankerTrainingConfig:
    """A ranker, its data, and how it is trained.

    Attributes:
        ranker: the network.
        training: the loop.
        loss: `contrastive`, the softmax with a learned temperature; `max_margin`, the talk's; or `hard_negative`: the margin to
            the hardest negatives of the batch alone.
        margin: by how much a pair has to win, in cosine; of the margin losses.
        warmup_epochs: of `hard_negative`: epochs with all negatives before; the hardest alone start badly.
        train_splits: the rows to learn from; COCO's `restval` belongs to training.
        validation_splits: the rows that decide which epoch is best, ranked all among each other.
        min_count: words seen less often become UNKNOWN.
        max_words: longer sentences are cut while training.
        batch_images: images a batch; the more, the more negatives. Of each process, where there are several: what the
            others have is no negative.
        batch_sentences: sentences an image in a batch, drawn anew each epoch; 0 is all of them.
        shuffle_buffer_megabytes: how much of the features is mixed at a time.
    """

    ranker: RankerConfig = field(default_factory=RankerConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            epochs=40,
            optimizer="adam",
            learning_rate=2e-3,
            schedule="cosine",
            clip_value=None,
            clip_norm=2.0,
            patience=8,
        )
    )
    loss: Literal["contrastive", "max_margin", "hard_negative"] = "contrastive"
    margin: float = 0.2
    warmup_epochs: int = 5
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    min_count: int = 4
    max_words: int = 30
    batch_images: int = 256
    batch_sentences: int = 1
    shuffle_buffer_megabytes: int = 512

    def __post_init__(self) -> None:
        for name, least in {"min_count": 1, "max_words": 1, "batch_images": 2, "shuffle_buffer_megabytes": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("batch_sentences", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not self.margin > 0:
            raise ConfigError(f"margin: expected more than 0, got {self.margin}")


@dataclass(frozen=True)
class RankingBatch:
    """Some images and sentences of each, and the epoch, which the loss may depend on."""

    captions: CaptionBatch
    epoch: int


class RankingObjective:
    """The rank of an image's own sentences, and of a sentence's own image."""

    score_name = "missed_recall"

    def __init__(
        self,
        model: Ranker,
        config: RankerTrainingConfig,
        training: CaptionBatches,
        validation: CaptionBatches,
        save: "_Save",
    ) -> None:
        self.model: Ranker = model
        self._config = config
        self._training = training
        self._validation = validation
        self._processes = ProcessGroup()
        self._steps = training.count(self._processes.count)
        self._save = save
        self._device = next(model.parameters()).device
        model.log_temperature.requires_grad_(config.loss == "contrastive")

    def batches(self, seed: int, epoch: int, first: int) -> Iterator[RankingBatch | None]:
        return islice(self._drawn(seed, epoch), first, None)  # each draw depends on those before it

    def _drawn(self, seed: int, epoch: int) -> Iterator[RankingBatch | None]:
        draw = np.random.default_rng([seed, epoch, 1])
        for batch in self._training.shares(seed, epoch, self._processes.rank, self._processes.count):
            if batch is None:
                yield None
            else:
                yield RankingBatch(sample_sentences(batch, self._config.batch_sentences, draw), epoch)

    def steps(self) -> int:
        return self._steps

    def loss(self, batch: RankingBatch) -> BatchLoss:
        """The mean over pairs of an image and a sentence; see `Objective.loss`."""
        images, sentences = self._embed(batch.captions)
        owner = torch.from_numpy(batch.captions.image_of_sentence).to(self._device)
        with torch.autocast(self._device.type, enabled=False):  # a temperature of 0.04 makes small errors large
            scores = images.float() @ sentences.float().t()
        if self._config.loss == "contrastive":
            loss = contrastive_loss(scores, owner, self.model.log_temperature)
        else:
            hardest = self._config.loss == "hard_negative" and batch.epoch >= self._config.warmup_epochs
            loss = max_margin_loss(scores, owner, self._config.margin, hardest)
        return BatchLoss(loss, loss.item() * len(owner), len(owner))

    def validate(self) -> dict[str, float]:
        """One minus the mean of the six recalls, and the median ranks, over the validation splits."""
        images: list[Tensor] = []
        sentences: list[Tensor] = []
        owners: list[Tensor] = []
        count = 0
        for batch in self._validation.in_order():
            of_images, of_sentences = self._embed(batch)
            images.append(of_images.float().cpu())
            sentences.append(of_sentences.float().cpu())
            owners.append(torch.from_numpy(batch.image_of_sentence) + count)
            count += len(of_images)
        scores = score_retrieval(torch.cat(images).numpy(), torch.cat(sentences).numpy(), torch.cat(owners).numpy())
        return {
            "missed_recall": 1 - scores.mean_recall,
            "image_to_text_median_rank": scores.image_to_text.median_rank,
            "text_to_image_median_rank": scores.text_to_image.median_rank,
        }

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self._save(output, self.model, training)
        draw_curves(output, training["history"])

    def _embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        return (
            self.model.embed_images(torch.from_numpy(batch.features).to(self._device)),
            self.model.embed_sentences(pad_sentences(batch.sentences).to(self._device)),
        )


def sample_sentences(batch: CaptionBatch, count: int, draw: np.random.Generator) -> CaptionBatch:
    """The batch with at the most `count` sentences an image, drawn at random; with all if `count` is 0."""
    if not count:
        return batch
    mixed = draw.permutation(len(batch.sentences))
    mixed = mixed[np.argsort(batch.image_of_sentence[mixed], kind="stable")]
    owners = batch.image_of_sentence[mixed]
    place = np.arange(len(owners)) - np.searchsorted(owners, owners)  # of each sentence among those of its image
    kept = mixed[place < count]
    return CaptionBatch(batch.features, [batch.sentences[number] for number in kept], batch.image_of_sentence[kept])


@dataclass(frozen=True)
class _Save:
    """Writes a ranker with all that embedding needs."""

    vocabulary: Vocabulary
    encoder: Mapping[str, Any]
    features_fingerprint: str

    def __call__(self, output: Folder, model: Ranker, training: dict[str, Any]) -> None:
        provenance = stamp_provenance({"features": self.features_fingerprint})
        save_ranker(output, model, self.vocabulary, self.encoder, provenance=provenance, training=training)


def train_ranker(
    features: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: RankerTrainingConfig,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a ranker on a features dataset, or goes on with a run that was stopped.

    Processes that `torchrun` has started train one ranker together, each with `batch_images` of every batch.

    Args:
        features: the features dataset.
        output: the run's folder: the best epoch's checkpoint, the metrics, the curves, and the state to go on from.
        config: the ranker and how it is trained.
        device: where.
        overwrite: replace a run of another configuration.
        progress: show a bar.

    Returns:
        One mapping an epoch, see `train`.

    Raises:
        DatasetError: the features are not complete, or have no sentences in a split that is needed.
    """
    with join_processes(resolve_device(device)) as target:
        return _train(Folder(features), Folder(output), config, target, overwrite, progress)


def _train(
    features: Folder,
    output: Folder,
    config: RankerTrainingConfig,
    device: torch.device,
    overwrite: bool,
    progress: bool,
) -> list[dict[str, float]]:
    processes = ProcessGroup()
    dataset = open_dataset(features.uri, "features").require_complete()
    processes.from_first(lambda: claim_folder(output, overwrite))
    vocabulary = Vocabulary.from_captions(read_captions(dataset, config.train_splits), config.min_count)
    next(read_captions(dataset, config.validation_splits))  # fails now rather than after the first epoch

    def encode(sentence: str) -> list[int]:
        return vocabulary.encode(sentence)[: config.max_words]

    window_bytes = config.shuffle_buffer_megabytes << 20
    batches = CaptionBatches(dataset, config.train_splits, encode, config.batch_images, window_bytes, pooled=True)
    held_out = CaptionBatches(dataset, config.validation_splits, vocabulary.encode, 100, window_bytes, pooled=True)
    seed_everything(config.training.seed)
    model = Ranker(config.ranker, feature_shape(dataset)[-1], len(vocabulary))
    if config.ranker.standardize_features:
        model.standardization.set_statistics(*map(torch.from_numpy, mean_and_std(dataset, config.train_splits)))
    objective = RankingObjective(
        model.to(device),
        config,
        batches,
        held_out,
        _Save(vocabulary, dataset.config["encoder"], dataset.fingerprint),
    )
    resolved = {"features": dataset.fingerprint, "processes": processes.count, **to_dict(config)}
    return train(objective, config.training, output, resolved, progress)
