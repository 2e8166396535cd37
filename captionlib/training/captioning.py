"""Trains captioners on features datasets, which hold extracted image features and reference captions."""

import os
import sys
from dataclasses import field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from captionlib.config import configclass, to_dict
from captionlib.data.batches.augmentation import FeatureMapAugmentation
from captionlib.data.batches.captions import (
    CaptionBatches,
    get_feature_shape,
    make_caption_tokenizer,
    read_captions,
    read_references,
)
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.text.vocabulary import END, Tokenization, Vocabulary
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import save_captioner
from captionlib.models.checkpoints.folder import add_versions_and_time
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.devices import resolve_device
from captionlib.storage.folders import Folder
from captionlib.training.caption_objective import BagOfWordsObjective, CaptioningObjective, CiderValidation
from captionlib.training.distributed import ProcessGroup, join_process_group
from captionlib.training.initialization import (
    build_captioner,
    describe_training_data,
    initialize_word_vectors,
    load_initial_captioner,
    require_other_folder,
)
from captionlib.training.loop import TrainingConfig, train
from captionlib.training.objective import Objective
from captionlib.training.self_critical import SelfCriticalConfig, SelfCriticalObjective
from captionlib.training.state import check_run_folder, delete_run

__all__ = ["CaptionerTrainingConfig", "train_captioner"]

_VALIDATION_IMAGES = 100  # images per validation batch


@configclass
class CaptionerTrainingConfig:
    """Configuration of a captioner, its training data and its training.

    Attributes:
        captioner: the architecture. If `init_from` is set, the checkpoint's architecture is used.
        training: settings of the training loop.
        objective: `cross_entropy` maximizes the probability of reference captions. `bag_of_words` is an optional first
            stage for small datasets, which predicts a caption's words without their order. `self_critical` is an
            optional last stage, which maximizes the CIDEr-D of sampled captions. Each stage is a separate run;
            `init_from` is the checkpoint of the previous stage.
        self_critical: settings of the self-critical objective.
        train_splits: the training splits; `restval` is the part of COCO's validation set that is used for training.
        validation_splits: the splits that select the best epoch.
        tokenization: what a token is: `words`, `characters`, or subwords (`bpe` or `unigram`), which are trained on the
            captions and require `pip install captionlib[subwords]`.
        min_count: words or characters with fewer occurrences than this are replaced by the UNKNOWN token.
        vocabulary_size: the maximum number of subwords.
        max_words: words or characters after which training truncates a caption. If None, 30 words or 200 characters.
        batch_images: images per batch in each process. The batch contains all captions of these images.
        random_crop: crop feature maps to at least this fraction of their height and width; 0 disables cropping.
        horizontal_flip: flip feature maps with probability 0.5. This has an effect only with attention or `encoder_top`
            (encoder layers that are fine-tuned with the captioner).
        encoder_top_learning_rate: the base learning rate of the layers of `encoder_top`; 0 freezes them.
        shuffle_buffer_megabytes: the size of the buffer in which features are shuffled.
        word_vectors: a word2vec, GloVe or fastText file with vectors that initialize the word embeddings.
        init_from: the checkpoint of a captioner to start from. Its weights, architecture, vocabulary and feature
            statistics are kept, and `tokenization`, `min_count` and `vocabulary_size` have no effect.
        label_smoothing: the fraction of the probability of each reference token that is spread over the vocabulary.
        best_by: the score that selects the best epoch, `perplexity` or the `cider` of generated captions (needs Java).
        decoding: how to generate captions for CIDEr. Its `max_tokens` also limits self-critical samples.
    """

    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: Literal["bag_of_words", "cross_entropy", "self_critical"] = "cross_entropy"
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    tokenization: Tokenization = "words"
    min_count: PositiveInt = 5
    vocabulary_size: PositiveInt = 8000
    max_words: PositiveInt | None = None
    batch_images: PositiveInt = 20
    random_crop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    horizontal_flip: bool = False
    encoder_top_learning_rate: NonNegativeFloat = 5e-5
    shuffle_buffer_megabytes: PositiveInt = 512
    word_vectors: str | None = None
    init_from: str | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    best_by: Literal["perplexity", "cider"] = "perplexity"
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        if self.init_from is not None and self.word_vectors is not None:
            raise ConfigError(
                "word_vectors: expected none with init_from, whose checkpoint already has word vectors; leave it out"
            )
        if self.word_vectors is not None and self.tokenization != "words":
            raise ConfigError(
                f"word_vectors: expected tokenization words, got {self.tokenization}; change it or leave "
                "word_vectors out"
            )
        if self.objective == "self_critical" and self.init_from is None:
            raise ConfigError(
                "init_from: expected a captioner trained by cross_entropy for objective self_critical, got none"
            )
        if self.objective != "cross_entropy" and self.label_smoothing:
            raise ConfigError(
                f"label_smoothing: expected 0 with objective {self.objective}, got {self.label_smoothing}; leave it out"
            )
        if self.objective == "bag_of_words" and self.best_by != "perplexity":
            raise ConfigError(
                f"best_by: expected perplexity with objective bag_of_words, got {self.best_by}; leave it out"
            )


def train_captioner(
    features: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: CaptionerTrainingConfig = CaptionerTrainingConfig(),
    *,
    weights: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a captioner on a features dataset, or resumes an interrupted run.

    Processes started by `torchrun` train one captioner together, each with `batch_images` images per step.

    Example:
        >>> training = captionlib.TrainingConfig(epochs=2)
        >>> config = captionlib.CaptionerTrainingConfig(training=training, min_count=1)
        >>> history = captionlib.train_captioner("features", "captioner", config, progress=False)
        >>> len(history)
        2

    Args:
        features: the folder of the features dataset.
        output: the folder for the checkpoint of the best epoch, metrics, curves and the state to resume from.
        config: the configuration of the captioner and its training.
        weights: the encoder's weights file, for a new captioner (without `init_from`) with an `encoder_top`. Required
            only if the file has been moved since the features were extracted.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: delete an earlier run in `output` instead of resuming it.
        progress: show a progress bar.

    Returns:
        The metrics of each epoch, which are also in `metrics.jsonl`.

    Raises:
        DatasetError: the features are incomplete, or a split has no captions.
        CheckpointError: `init_from` is not a checkpoint, or its encoder or `weights` does not match the features.
        ConfigError: `config.captioner` does not match the checkpoint, or `weights` is missing or not needed.
    """
    if weights is not None and (config.captioner.encoder_top is None or config.init_from is not None):
        raise ConfigError(
            "--weights: expected only for a new captioner with captioner.encoder_top, or for fine-tuning on a "
            "manifest (list of images); leave it out"
        )
    folder = Folder(output)
    with join_process_group(resolve_device(device)) as process_device:
        group = ProcessGroup()
        dataset = open_dataset(features, "features").require_complete()
        require_other_folder(config.init_from, folder)
        group.run_on_process_0(lambda: check_run_folder(folder))
        next(read_captions(dataset, config.validation_splits))  # raises an error now if there are no captions
        torch.manual_seed(config.training.seed)
        model, vocabulary, config, provenance = _initialize(config, dataset, weights)
        if progress and group.is_first and "word_vectors" in provenance:
            print(f"word vectors: {provenance['word_vectors']}", file=sys.stderr)
        settings = {"features": dataset.compute_content_checksum(), "world_size": group.world_size, **to_dict(config)}
        if "init_from" in provenance:
            settings["init_from_fingerprint"] = provenance["init_from"]["fingerprint"]
        objective = _make_objective(dataset, model.to(process_device), vocabulary, config, provenance)
        if overwrite:
            group.run_on_process_0(lambda: delete_run(folder))
        return train(objective, config.training, folder, settings, progress)


def _initialize(
    config: CaptionerTrainingConfig, dataset: ShardedDataset, weights: str | None
) -> tuple[CaptionerNetwork, Vocabulary, CaptionerTrainingConfig, dict[str, Any]]:
    """Returns the initial captioner, its vocabulary, the resolved configuration and a record of the training data."""
    provenance: dict[str, Any] = {
        **describe_training_data(dataset, config.train_splits, config.validation_splits),
        "objective": config.objective,
    }
    if config.init_from is not None:
        initial = load_initial_captioner(config.init_from, config.captioner, dataset)
        provenance["init_from"] = {"checkpoint": config.init_from, "fingerprint": initial.fingerprint}
        return initial.model, initial.vocabulary, replace(config, captioner=initial.config), provenance
    captions = read_captions(dataset, config.train_splits)
    vocabulary = Vocabulary.from_captions(captions, config.min_count, config.tokenization, config.vocabulary_size)
    weights_file = weights or dataset.encoder_weights or None
    model = build_captioner(config.captioner, dataset, config.train_splits, vocabulary, weights_file)
    if config.word_vectors is not None:
        provenance["word_vectors"] = initialize_word_vectors(model, vocabulary, config.word_vectors)
    return model, vocabulary, config, provenance


def _make_objective(
    dataset: ShardedDataset,
    model: CaptionerNetwork,
    vocabulary: Vocabulary,
    config: CaptionerTrainingConfig,
    provenance: dict[str, Any],
) -> Objective[Any, CaptionerNetwork]:
    training, validation = _make_batches(dataset, config, model, vocabulary)
    cider = None
    if config.best_by == "cider":
        all_references = read_references(dataset, config.validation_splits)
        references = [captions for captions in all_references if any(map(vocabulary.encode, captions))]
        cider = CiderValidation(validation, references, vocabulary, config.decoding)
    module_learning_rates = {}
    if model.encoder_top is not None:
        module_learning_rates["encoder_top"] = config.encoder_top_learning_rate
        model.encoder_top.requires_grad_(config.encoder_top_learning_rate > 0)

    def save(output: Folder, history: dict[str, Any]) -> None:
        encoder, record = dataset.config["encoder"], add_versions_and_time(provenance)
        save_captioner(output, model, vocabulary, encoder, provenance=record, training=history)

    if config.objective == "bag_of_words":
        return BagOfWordsObjective(model, training, validation, save, module_learning_rates=module_learning_rates)
    captioning = CaptioningObjective(
        model, training, validation, save, config.label_smoothing, cider, module_learning_rates
    )
    captioning.unigram_perplexity = vocabulary.unigram_perplexity(
        [*vocabulary.encode(caption), END] for caption in read_captions(dataset, config.validation_splits)
    )
    if config.objective == "self_critical":
        train_references = read_references(dataset, config.train_splits)
        reference_ids = (list(map(training.encode, captions)) for captions in train_references)
        max_tokens = config.decoding.find_max_tokens(vocabulary.unit)
        return SelfCriticalObjective(captioning, config.self_critical, reference_ids, max_tokens)
    return captioning


def _make_batches(
    dataset: ShardedDataset, config: CaptionerTrainingConfig, model: CaptionerNetwork, vocabulary: Vocabulary
) -> tuple[CaptionBatches, CaptionBatches]:
    augmentation = FeatureMapAugmentation(config.random_crop, config.horizontal_flip)
    if augmentation and len(get_feature_shape(dataset)) == 1:
        raise DatasetError(
            f"{dataset.folder.uri}: random_crop and horizontal_flip need feature maps [positions, channels], got "
            "one vector per image; extract features with pooling none at a node with spatial output, such as "
            "features.29 of vgg16, or leave both out"
        )
    encode, buffer_bytes = make_caption_tokenizer(vocabulary, config.max_words), config.shuffle_buffer_megabytes << 20
    pooled = model.attention_module is None and model.encoder_top is None
    return (
        CaptionBatches(dataset, config.train_splits, encode, config.batch_images, buffer_bytes, pooled, augmentation),
        CaptionBatches(dataset, config.validation_splits, vocabulary.encode, _VALIDATION_IMAGES, buffer_bytes, pooled),
    )
