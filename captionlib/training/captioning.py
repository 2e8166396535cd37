"""Fits a captioner on `features/`: what people said of an image is to become likely."""

import os
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from captionlib.config import to_dict
from captionlib.data.batches.augmentation import FeatureMapAugmentation
from captionlib.data.batches.captions import CaptionBatches, feature_shape, read_captions, read_references
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.captioner import Captioner, CaptionerConfig
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.devices import resolve_device
from captionlib.storage.folders import Folder
from captionlib.training.bag_of_words import BagOfWordsObjective
from captionlib.training.caption_objective import CaptioningObjective, CaptionSaver
from captionlib.training.caption_validation import CiderValidation
from captionlib.training.distributed import ProcessGroup, join_processes
from captionlib.training.initialization import build_captioner, open_start, refuse_own_folder, start_word_vectors
from captionlib.training.loop import TrainingConfig, claim_folder, seed_everything, train
from captionlib.training.objective import Objective
from captionlib.training.self_critical import SelfCriticalConfig, SelfCriticalObjective

__all__ = ["CaptionerTrainingConfig", "CaptioningObjective", "train_captioner"]


@dataclass(frozen=True)
class CaptionerTrainingConfig:
    """A captioner, its data, and how it is trained.

    Attributes:
        captioner: the network; with `init_from` it is the checkpoint's.
        training: the loop.
        objective: what is learned: to say what people said (`cross_entropy`); before it, where images are few, which
            words they said, in whatever order (`bag_of_words`); after it, to write what has a high CIDEr-D (`self_critical`).
            A later stage goes on from an earlier one's captioner with `init_from`; only the last one needs it.
        self_critical: how the last of these is learned.
        train_splits: the rows to learn from; COCO's `restval` belongs to training.
        validation_splits: the rows that decide which epoch is best.
        min_count: words seen less often become UNKNOWN.
        max_words: longer sentences are cut while training.
        batch_images: images a batch, each with all of its sentences; of each process, where there are several.
        batch_sentences: mix sentences, not images, and give each batch so many, of more different images; of each
            process, where there are several. None mixes images.
        random_crop: show a part of each image's map while training, drawn anew each time: at least this share of its sides; 0
            shows the whole. It needs features that are spatial maps.
        horizontal_flip: mirror every other map while training, drawn anew each time. It needs maps too, and does nothing for a
            captioner without encoder_top or attention.
        encoder_top_learning_rate: of the captioner's encoder_top, before the schedule; `training.learning_rate` is that of the rest.
            0 leaves it as it is.
        shuffle_buffer_megabytes: how much of the features is mixed at a time.
        word_vectors: a file of word2vec (text or binary), GloVe or fastText vectors to start from; words that it lacks
            are drawn, as all are without one.
        init_from: the checkpoint folder of a captioner that training starts from: its weights, its shape, its words
            and how it standardises features, which have to be of its encoder. `min_count` counts for nothing then.
        label_smoothing: the share of each word's target that is spread over all words.
        best_by: which score of the validation splits decides what is best and when to stop: `perplexity`, or the
            `cider` of the captions written for them, which needs Java.
        decoding: how those captions are searched for; its `max_tokens` also bounds what self-critical training draws.
    """

    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: Literal["bag_of_words", "cross_entropy", "self_critical"] = "cross_entropy"
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    min_count: int = 5
    max_words: int = 30
    batch_images: int = 20
    batch_sentences: int | None = None
    random_crop: float = 0.0
    horizontal_flip: bool = False
    encoder_top_learning_rate: float = 5e-5
    shuffle_buffer_megabytes: int = 512
    word_vectors: str | None = None
    init_from: str | None = None
    label_smoothing: float = 0.0
    best_by: Literal["perplexity", "cider"] = "perplexity"
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        for name in ("min_count", "max_words", "batch_images", "shuffle_buffer_megabytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("label_smoothing", "random_crop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 0 and below 1, got {getattr(self, name)}")
        if self.encoder_top_learning_rate < 0:
            raise ConfigError(f"encoder_top_learning_rate: expected at least 0, got {self.encoder_top_learning_rate}")
        if self.batch_sentences is not None and self.batch_sentences < 1:
            raise ConfigError(f"batch_sentences: expected at least 1, got {self.batch_sentences}")
        if self.init_from is not None and self.word_vectors is not None:
            raise ConfigError("init_from brings word vectors of its own, so word_vectors has no place; set one of both")
        if self.objective == "self_critical" and self.init_from is None:
            raise ConfigError(
                "objective: self_critical is a second stage; expected init_from with the checkpoint of a captioner "
                "that has learned by cross_entropy, got none"
            )
        self._check_values_of_objective()

    def _check_values_of_objective(self) -> None:
        """Refuses what the objective has no use for."""
        useless: dict[str, dict[str, Any]] = {
            "bag_of_words": {"label_smoothing": 0.0, "best_by": "perplexity"},
            "cross_entropy": {},
            "self_critical": {"label_smoothing": 0.0, "batch_sentences": None},
        }
        for name, default in useless[self.objective].items():
            if (got := getattr(self, name)) != default:
                raise ConfigError(
                    f"{name}: expected {default} with objective {self.objective}, got {got}; leave it out"
                )


def train_captioner(
    features: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: CaptionerTrainingConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a captioner on a features dataset, or goes on with a run that was stopped.

    Processes that `torchrun` has started train one captioner together, each with `batch_images` of every batch.

    Args:
        features: the features dataset.
        output: the run's folder: the best epoch's checkpoint, the metrics, the curves, and the state to go on from.
        config: the captioner and how it is trained.
        weights: the encoder's weights file, where the captioner begins with a encoder_top and the encoder had its weights from
            a file.
        device: where.
        overwrite: replace a run of another configuration.
        progress: show a bar.

    Returns:
        One mapping an epoch, see `train`.

    Raises:
        DatasetError: the features are not complete, or have no sentences in a split that is needed.
        CheckpointError: there is nothing to start from where `init_from` says, or it or the weights are of another
            encoder.
        ConfigError: `captioner` is not the shape of what is started from; or weights are missing, or given in vain.
    """
    if weights is not None and (config.captioner.encoder_top is None or config.init_from is not None):
        raise ConfigError(
            "--weights is for a captioner that begins with a encoder_top of the encoder (captioner.encoder_top), or for tuning an "
            "encoder on the images of a manifest; leave it out"
        )
    with join_processes(resolve_device(device)) as target:
        return _train(Folder(features), Folder(output), config, weights, target, overwrite, progress)


def _train(
    features: Folder,
    output: Folder,
    config: CaptionerTrainingConfig,
    weights: str | None,
    device: torch.device,
    overwrite: bool,
    progress: bool,
) -> list[dict[str, float]]:
    processes = ProcessGroup()
    dataset = open_dataset(features.uri, "features").require_complete()
    refuse_own_folder(config.init_from, output)
    processes.from_first(lambda: claim_folder(output, overwrite))
    next(read_captions(dataset, config.validation_splits))  # fails now rather than after the first epoch
    seed_everything(config.training.seed)
    resolved: dict[str, Any] = {"features": dataset.fingerprint, "processes": processes.count}
    provenance: dict[str, Any] = {"features": dataset.fingerprint, "objective": config.objective}
    if config.init_from is None:
        vocabulary = Vocabulary.from_captions(read_captions(dataset, config.train_splits), config.min_count)
        model = build_captioner(config.captioner, dataset, config.train_splits, vocabulary, weights)
    else:
        start = open_start(config.init_from, config.captioner, dataset)
        model, vocabulary, config = start.model, start.vocabulary, replace(config, captioner=start.config)
        resolved["init_from_fingerprint"] = start.fingerprint
        provenance["init_from"] = {"checkpoint": config.init_from, "fingerprint": start.fingerprint}
    if config.word_vectors is not None:
        provenance["word_vectors"] = said = start_word_vectors(model, vocabulary, config.word_vectors)
        if processes.is_first:
            print("word vectors  " + "  ".join(f"{name} {value}" for name, value in said.items()), file=sys.stderr)
    objective = _objective(config, dataset, vocabulary, model.to(device), provenance)
    return train(objective, config.training, output, {**resolved, **to_dict(config)}, progress)


def _objective(
    config: CaptionerTrainingConfig,
    dataset: ShardedDataset,
    vocabulary: Vocabulary,
    model: Captioner,
    provenance: dict[str, Any],
) -> Objective[Any]:
    def encode(sentence: str) -> list[int]:
        return vocabulary.encode(sentence)[: config.max_words]

    for name in ("random_crop", "horizontal_flip"):
        if getattr(config, name) and len(feature_shape(dataset)) == 1:
            raise DatasetError(
                f"{dataset.folder.uri}: {name} changes maps [positions, channels], got one vector an image; extract "
                f"with pooling none at a node that is a map, such as features.29 of vgg16, or leave {name} out"
            )
    window_bytes, pooled = config.shuffle_buffer_megabytes << 20, model.attention is None and model.encoder_top is None
    batches = CaptionBatches(
        dataset,
        config.train_splits,
        encode,
        config.batch_images,
        window_bytes,
        pooled,
        config.batch_sentences,
        FeatureMapAugmentation(config.random_crop, config.horizontal_flip),
    )
    held_out = CaptionBatches(dataset, config.validation_splits, encode, config.batch_images, window_bytes, pooled)
    cider = None
    if config.best_by == "cider":
        cider = CiderValidation(dataset, config.validation_splits, vocabulary, config.decoding).score
    save = CaptionSaver(vocabulary, dataset.config["encoder"], provenance)
    rates = {}
    if model.encoder_top is not None:
        rates["encoder_top"] = config.encoder_top_learning_rate
        model.encoder_top.requires_grad_(config.encoder_top_learning_rate > 0)
    captioning = CaptioningObjective(model, batches, held_out, save, config.label_smoothing, cider, rates)
    if config.objective == "cross_entropy":
        return captioning
    if config.objective == "bag_of_words":
        return BagOfWordsObjective(captioning, held_out)
    references = (list(map(encode, sentences)) for sentences in read_references(dataset, config.train_splits))
    return SelfCriticalObjective(captioning, config.self_critical, references, config.decoding.max_tokens)
