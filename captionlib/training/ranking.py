"""Trains rankers (dual encoders for image-text retrieval) on features datasets (extracted image features and captions).

Spatial feature maps are averaged over their positions.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from captionlib.config import configclass, to_dict
from captionlib.data.batches.captions import (
    CaptionBatch,
    CaptionBatches,
    compute_mean_and_std,
    get_feature_shape,
    make_caption_tokenizer,
    read_captions,
)
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.text.vocabulary import Tokenization, Vocabulary
from captionlib.evaluation.retrieval import score_retrieval
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import save_ranker
from captionlib.models.checkpoints.folder import add_versions_and_time
from captionlib.models.devices import resolve_device
from captionlib.models.rankers.ranker import RankerConfig, RankerNetwork
from captionlib.storage.folders import Folder
from captionlib.training.distributed import ProcessGroup, join_process_group
from captionlib.training.initialization import describe_training_data
from captionlib.training.loop import TrainingConfig, train
from captionlib.training.objective import BatchLoss, Objective, SaveCheckpoint
from captionlib.training.ranking_losses import contrastive_loss, max_margin_loss
from captionlib.training.state import check_run_folder, delete_run

__all__ = ["RankerTrainingConfig", "RankingBatch", "RankingObjective", "sample_captions", "train_ranker"]

_VALIDATION_IMAGES = 100  # images per validation batch


@configclass
class RankerTrainingConfig:
    """Configuration of a ranker, its training data and its training.

    Attributes:
        ranker: the architecture.
        training: settings of the training loop.
        loss: `contrastive`, with a learned temperature; `max_margin` (Karpathy & Fei-Fei 2015); or `hard_negative`, the
            max-margin loss with only the hardest negatives of the batch (Faghri et al. 2018).
        margin: the margin of the max-margin losses, in cosine similarity.
        warmup_epochs: the number of initial epochs in which `hard_negative` uses all negatives.
        train_splits: the training splits; `restval` is the part of COCO's validation set that is used for training.
        validation_splits: the splits that select the best epoch. All their images are ranked together.
        tokenization: what a token is: `words`, `characters`, or subwords (`bpe` or `unigram`), which are trained on the
            captions and require `pip install captionlib[subwords]`.
        min_count: words or characters with fewer occurrences than this are replaced by the UNKNOWN token.
        vocabulary_size: the maximum number of subwords.
        max_words: words or characters after which training truncates a caption. If None, 30 words or 200 characters.
        batch_images: images per batch in each process. All negatives come from the batch of the same process.
        captions_per_image: the number of captions to sample per image and epoch; 0 uses all captions.
        shuffle_buffer_megabytes: the size of the buffer in which features are shuffled.
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
    margin: PositiveFloat = 0.2
    warmup_epochs: NonNegativeInt = 5
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    tokenization: Tokenization = "words"
    min_count: PositiveInt = 4
    vocabulary_size: PositiveInt = 8000
    max_words: PositiveInt | None = None
    batch_images: Annotated[int, Field(ge=2)] = 256
    captions_per_image: NonNegativeInt = 1
    shuffle_buffer_megabytes: PositiveInt = 512


@dataclass(frozen=True)
class RankingBatch:
    """Images with captions, and the epoch, which the loss can depend on."""

    captions: CaptionBatch
    epoch: int


class RankingObjective(Objective[RankingBatch, RankerNetwork]):
    """Ranks an image's captions above other captions, and a caption's image above other images."""

    score_name = "mean_recall"
    higher_is_better = True

    def __init__(
        self,
        model: RankerNetwork,
        config: RankerTrainingConfig,
        training: CaptionBatches,
        validation: CaptionBatches,
        save: SaveCheckpoint,
    ) -> None:
        super().__init__(model, save)
        self._config = config
        self._training = training
        self._validation = validation
        model.log_temperature.requires_grad_(config.loss == "contrastive")

    def batches(self, seed: int, epoch: int, first_batch: int) -> Iterator[RankingBatch | None]:
        batches = self._training.shuffled(seed, epoch, self._group.rank, self._group.world_size, first_batch)
        for index, batch in enumerate(batches, first_batch):
            if batch is None:
                yield None
            else:
                generator = np.random.default_rng([seed, epoch, index, self._group.rank])
                yield RankingBatch(sample_captions(batch, self._config.captions_per_image, generator), epoch)

    def steps_per_epoch(self) -> int:
        return self._training.count(self._group.world_size)

    def loss(self, batch: RankingBatch) -> BatchLoss:
        images, captions = self._embed(batch.captions)
        image_of_caption = torch.from_numpy(batch.captions.image_of_caption).to(self._device)
        with torch.autocast(self._device.type, enabled=False):  # a temperature of 0.04 amplifies rounding errors
            scores = images.float() @ captions.float().t()
        if self._config.loss == "contrastive":
            loss = contrastive_loss(scores, image_of_caption, self.model.log_temperature)
        else:
            hard_negatives = self._config.loss == "hard_negative" and batch.epoch >= self._config.warmup_epochs
            loss = max_margin_loss(scores, image_of_caption, self._config.margin, hard_negatives)
        return BatchLoss(loss, loss.item() * len(image_of_caption), len(image_of_caption))

    def validate(self) -> dict[str, float]:
        images, captions, image_of_caption, image_count = [], [], [], 0
        for batch in self._validation.in_order():
            image_embeddings, caption_embeddings = self._embed(batch)
            images.append(image_embeddings.float().cpu().numpy())
            captions.append(caption_embeddings.float().cpu().numpy())
            image_of_caption.append(batch.image_of_caption + image_count)
            image_count += len(image_embeddings)
        scores = score_retrieval(np.concatenate(images), np.concatenate(captions), np.concatenate(image_of_caption))
        return {
            "mean_recall": scores.mean_recall,
            "image_to_text_median_rank": scores.image_to_text.median_rank,
            "text_to_image_median_rank": scores.text_to_image.median_rank,
        }

    def _embed(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        return (
            self.model.embed_images(torch.from_numpy(batch.features).to(self._device)),
            self.model.embed_sentences(pad_sentences(batch.sentences).to(self._device)),
        )


def sample_captions(batch: CaptionBatch, count: int, generator: np.random.Generator) -> CaptionBatch:
    """Returns the batch with at most `count` random captions per image, or with all of them if `count` is 0."""
    if not count:
        return batch
    shuffled = generator.permutation(len(batch.sentences))
    shuffled = shuffled[np.argsort(batch.image_of_caption[shuffled], kind="stable")]
    images = batch.image_of_caption[shuffled]
    position = np.arange(len(images)) - np.searchsorted(images, images)  # index of each caption within its image
    selected = shuffled[position < count]
    sentences = [batch.sentences[index] for index in selected]
    return CaptionBatch(batch.features, sentences, batch.image_of_caption[selected])


def train_ranker(
    features: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: RankerTrainingConfig = RankerTrainingConfig(),
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a ranker on a features dataset, or resumes an interrupted run.

    Processes started by `torchrun` train one ranker together, each with `batch_images` images per step.

    Example:
        >>> config = captionlib.RankerTrainingConfig(training=captionlib.TrainingConfig(epochs=2), min_count=1)
        >>> history = captionlib.train_ranker("features", "ranker", config, progress=False)
        >>> len(history)
        2

    Args:
        features: the folder of the features dataset.
        output: the folder for the checkpoint of the best epoch, metrics, curves and the state to resume from.
        config: the configuration of the ranker and its training.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: delete an earlier run in this folder and start again.
        progress: show a progress bar.

    Returns:
        The metrics of each epoch, which are also in `metrics.jsonl`.

    Raises:
        DatasetError: the features are incomplete, or a split has no captions.
    """
    folder = Folder(output)
    with join_process_group(resolve_device(device)) as process_device:
        group = ProcessGroup()
        dataset = open_dataset(features, "features").require_complete()
        group.run_on_process_0(lambda: check_run_folder(folder))
        next(read_captions(dataset, config.validation_splits))  # raises an error now if there are no captions
        objective = _make_objective(dataset, config, process_device)
        settings = {"features": dataset.compute_content_checksum(), "world_size": group.world_size, **to_dict(config)}
        if overwrite:
            group.run_on_process_0(lambda: delete_run(folder))
        return train(objective, config.training, folder, settings, progress)


def _make_objective(dataset: ShardedDataset, config: RankerTrainingConfig, device: torch.device) -> RankingObjective:
    captions = read_captions(dataset, config.train_splits)
    vocabulary = Vocabulary.from_captions(captions, config.min_count, config.tokenization, config.vocabulary_size)
    encode, buffer_bytes = make_caption_tokenizer(vocabulary, config.max_words), config.shuffle_buffer_megabytes << 20
    training = CaptionBatches(dataset, config.train_splits, encode, config.batch_images, buffer_bytes, pooled=True)
    validation = CaptionBatches(
        dataset, config.validation_splits, vocabulary.encode, _VALIDATION_IMAGES, buffer_bytes, pooled=True
    )
    torch.manual_seed(config.training.seed)
    model = RankerNetwork(config.ranker, get_feature_shape(dataset)[-1], len(vocabulary))
    model.standardization.set_statistics(*map(torch.from_numpy, compute_mean_and_std(dataset, config.train_splits)))
    provenance = describe_training_data(dataset, config.train_splits, config.validation_splits)

    def save(output: Folder, history: dict[str, Any]) -> None:
        encoder, record = dataset.config["encoder"], add_versions_and_time(provenance)
        save_ranker(output, model, vocabulary, encoder, provenance=record, training=history)

    return RankingObjective(model.to(device), config, training, validation, save)
