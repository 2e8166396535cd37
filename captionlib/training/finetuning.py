"""Fits a captioner together with its encoder on the images of `manifest/`: what sees is tuned to what is to be said.

The captioner is one that has learnt from features, for what it asks of an encoder before that is noise. The encoder has
a learning rate of its own (neuraltalk2's 1e-5), and keeps to evaluation mode.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import torch

from captionlib.config import to_dict
from captionlib.data.batches.images import ImageBatches, read_rows
from captionlib.data.batches.skipped import SkippedImages
from captionlib.data.images.loading import LoadImages, LoadingConfig, open_loader
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import FAILURES_FOLDER
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError
from captionlib.models.captioners.end_to_end import ImageCaptioner
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner, save_captioner
from captionlib.models.checkpoints.folder import stamp_provenance
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import Encoder, EncoderConfig, describe_finetuned_encoder, load_encoder
from captionlib.models.encoders.network import list_parameters_before
from captionlib.models.encoders.weights import serialize_weights
from captionlib.storage.folders import Folder
from captionlib.training.caption_objective import CaptioningObjective
from captionlib.training.caption_validation import ImageCiderValidation
from captionlib.training.distributed import ProcessGroup, join_processes
from captionlib.training.initialization import refuse_own_folder
from captionlib.training.loop import TrainingConfig, claim_folder, seed_everything, train

__all__ = ["EncoderFinetuningConfig", "FinetuningConfig", "finetune_captioner"]


@dataclass(frozen=True)
class EncoderFinetuningConfig:
    """How the encoder is tuned.

    Attributes:
        learning_rate: of its weights, before the schedule; `training.learning_rate` is the captioner's.
        from_node: the first node of the network whose weights are tuned, or a module such as `layer4`; those before it
            stay as they are, and cost neither gradients nor their memory. None tunes all.
    """

    learning_rate: float = 1e-5
    from_node: str | None = None

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ConfigError(f"encoder.learning_rate: expected more than 0, got {self.learning_rate}")


@dataclass(frozen=True)
class FinetuningConfig:
    """A captioner that is tuned together with its encoder, its images, and how it is trained.

    Attributes:
        init_from: the checkpoint folder of the captioner; its words, its shape and its encoder are kept.
        encoder: how the encoder is tuned.
        training: the loop, and the captioner's learning rate.
        train_splits: the rows to learn from; COCO's `restval` belongs to training.
        validation_splits: the rows that decide which epoch is best.
        max_words: longer sentences are cut while training.
        batch_images: images a batch, each with all of its sentences; of each process, where there are several.
        horizontal_flip: mirror every other image, drawn anew in each epoch.
        label_smoothing: the share of each word's target that is spread over all words.
        best_by: which score of the validation splits decides what is best and when to stop: `perplexity`, or the
            `cider` of the captions written for them, which needs Java.
        decoding: how those captions are searched for.
        loading: how images are fetched and decoded.
        max_failure_ratio: of the images; the run ends when more could not be had.
    """

    init_from: str | None = None
    encoder: EncoderFinetuningConfig = field(default_factory=EncoderFinetuningConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(epochs=10, optimizer="adam", learning_rate=1e-4)
    )
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    max_words: int = 30
    batch_images: int = 16
    horizontal_flip: bool = False
    label_smoothing: float = 0.0
    best_by: Literal["perplexity", "cider"] = "perplexity"
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    max_failure_ratio: float = 0.05

    def __post_init__(self) -> None:
        for name in ("max_words", "batch_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing: expected at least 0 and below 1, got {self.label_smoothing}")
        if not 0 <= self.max_failure_ratio <= 1:
            raise ConfigError(f"max_failure_ratio: expected 0 to 1, got {self.max_failure_ratio}")


def finetune_captioner(
    manifest: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: FinetuningConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Tunes a captioner and its encoder on the images of a manifest, or goes on with a run that was stopped.

    Images that cannot be had are left out, and kept with their reasons in the run's folder. Processes that `torchrun`
    has started train one captioner together, each with `batch_images` of every batch.

    Args:
        manifest: the manifest dataset.
        output: the run's folder: the best epoch's checkpoint with its encoder, and all else as of `train_captioner`.
        config: what is started from and how it is trained.
        weights: the encoder's weights file, where the captioner learned from features of such a file.
        device: where.
        overwrite: replace a run of another configuration.
        progress: show a bar.

    Returns:
        One mapping an epoch, see `train`.

    Raises:
        CheckpointError: there is nothing to start from where `init_from` says, or the weights are of another encoder.
        ConfigError: there is no `init_from`, or nothing of the encoder to tune.
        DatasetError: the manifest is not complete, or has no sentences in a split that is needed.
        FailureRatioError: more images could not be had than the configuration allows.
    """
    if config.init_from is None:
        raise ConfigError(
            "init_from: expected the captioner to tune with its encoder, got none; train one on features first, as "
            "the gradients of one that has learnt nothing spoil the encoder"
        )
    dataset = open_dataset(manifest, "manifest").require_complete()
    refuse_own_folder(config.init_from, Folder(output))
    start = load_captioner(config.init_from)
    with join_processes(resolve_device(device)) as target:
        encoder = _open_encoder(start, weights, config.encoder.from_node, target)
        return _finetune(dataset, Folder(output), config, start, encoder, overwrite, progress)


def _open_encoder(start: LoadedCaptioner, weights: str | None, from_node: str | None, device: torch.device) -> Encoder:
    """The captioner's encoder, with gradients from a node on."""
    config = EncoderConfig.from_description(start.encoder, weights or start.encoder_weights)
    encoder = load_encoder(config, str(device), trainable=True)
    start.require_encoder(encoder.description)
    frozen = set() if from_node is None else list_parameters_before(config.model, from_node)
    tuned = []
    for name, parameter in encoder.network.network.named_parameters():
        parameter.requires_grad_(name not in frozen)
        tuned += [name] if name not in frozen else []
    if not tuned:
        raise ConfigError(
            f"encoder.from_node: expected a node with weights up to {config.node}, where the encoder of {config.model} "
            f"is cut, got {from_node}, after which there are none; give an earlier node"
        )
    return encoder


def _finetune(
    dataset: ShardedDataset,
    output: Folder,
    config: FinetuningConfig,
    start: LoadedCaptioner,
    encoder: Encoder,
    overwrite: bool,
    progress: bool,
) -> list[dict[str, float]]:
    processes = ProcessGroup()
    processes.from_first(lambda: claim_folder(output, overwrite))
    training, validation = (read_rows(dataset, splits) for splits in (config.train_splits, config.validation_splits))
    resolved = {
        "manifest": dataset.fingerprint,
        "processes": processes.count,
        "init_from_fingerprint": start.fingerprint,
    }
    started = {"checkpoint": config.init_from, "fingerprint": start.fingerprint}
    save = TunedSaver(start.vocabulary, encoder, {"manifest": dataset.fingerprint, "init_from": started})
    images = len(training) + len(validation)
    skipped = SkippedImages(output, processes.rank, images, config.max_failure_ratio)
    seed_everything(config.training.seed)
    model = ImageCaptioner(encoder.network, start.model.to(encoder.device))
    with open_loader(config.loading, encoder.preprocessing) as load:
        objective = _objective(config, model, training, validation, load, skipped, save)
        try:
            return train(objective, config.training, output, {**resolved, **to_dict(config)}, progress)
        finally:
            skipped.write()
            if len(skipped):
                print(f"{skipped.describe()}: see {output.address(FAILURES_FOLDER)}", file=sys.stderr)


def _objective(
    config: FinetuningConfig,
    model: ImageCaptioner,
    training: pa.Table,
    validation: pa.Table,
    load: LoadImages,
    skipped: SkippedImages,
    save: "TunedSaver",
) -> CaptioningObjective[ImageCaptioner]:
    vocabulary = save.vocabulary

    def encode(sentence: str) -> list[int]:
        return vocabulary.encode(sentence)[: config.max_words]

    batches = ImageBatches(training, encode, config.batch_images, load, skipped, config.horizontal_flip)
    held_out = ImageBatches(validation, encode, config.batch_images, load, skipped)
    cider = None
    if config.best_by == "cider":
        cider = ImageCiderValidation(validation, held_out, vocabulary, config.decoding).score
    rates = {"encoder": config.encoder.learning_rate}
    return CaptioningObjective(model, batches, held_out, save, config.label_smoothing, cider, rates)


@dataclass(frozen=True)
class TunedSaver:
    """Writes a captioner together with the encoder that was tuned with it.

    Attributes:
        vocabulary: its words.
        encoder: the encoder, with the description that it had before.
        provenance: where it comes from; versions and a date are added.
    """

    vocabulary: Vocabulary
    encoder: Encoder
    provenance: Mapping[str, Any]

    def __call__(self, output: Folder, model: ImageCaptioner, training: dict[str, Any]) -> None:
        weights = model.encoder.export_weights()
        save_captioner(
            output,
            model.captioner,
            self.vocabulary,
            describe_finetuned_encoder(self.encoder.description, weights),
            provenance=stamp_provenance(self.provenance),
            training=training,
            encoder_file=serialize_weights(weights, self.encoder.preprocessing),
        )
