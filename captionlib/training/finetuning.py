"""Fine-tunes a captioner together with its encoder on the images of `manifest/`.

The captioner must have been trained on features before: the gradients of an untrained one would damage the encoder. The
encoder has its own learning rate (1e-5 in neuraltalk2) and stays in evaluation mode.
"""

import os
import sys
from dataclasses import field
from typing import Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from captionlib.config import configclass, to_dict
from captionlib.data.batches.captions import make_encoder
from captionlib.data.batches.images import ImageBatches, read_captioned_rows
from captionlib.data.batches.skipped import SkippedImages
from captionlib.data.images.loading import LoadImages, LoadingConfig, open_loader
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import FAILURES_FOLDER
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
from captionlib.training.caption_objective import CaptioningObjective, CiderValidation
from captionlib.training.distributed import ProcessGroup, join_process_group
from captionlib.training.initialization import require_other_folder
from captionlib.training.loop import TrainingConfig, claim_folder, seed_everything, train

__all__ = ["EncoderFinetuningConfig", "FinetuningConfig", "finetune_captioner"]


@configclass
class EncoderFinetuningConfig:
    """How the encoder is fine-tuned.

    Attributes:
        learning_rate: of the encoder, before the schedule; `training.learning_rate` is the captioner's.
        from_node: the first node or module to fine-tune, such as `layer4`. Earlier layers are frozen and need no memory
            for gradients. None fine-tunes all layers.
    """

    learning_rate: PositiveFloat = 1e-5
    from_node: str | None = None


@configclass
class FinetuningConfig:
    """A captioner to fine-tune with its encoder, the training data, and how to train it.

    Attributes:
        init_from: the checkpoint of the captioner. Its vocabulary, shape and encoder are kept.
        encoder: how the encoder is fine-tuned.
        training: the training loop, with the learning rate of the captioner.
        train_splits: the training splits; `restval` is part of COCO's training set.
        validation_splits: the splits that select the best epoch.
        max_words: longer captions are cut off in training.
        batch_images: images per batch and process, each with all its captions.
        horizontal_flip: flip each image with probability 0.5.
        label_smoothing: the fraction of each target that is spread evenly over all words.
        best_by: the score that selects the best epoch: `perplexity`, or the `cider` of generated captions, which needs
            Java.
        decoding: how these captions are generated.
        loading: how images are fetched and decoded.
        max_failure_ratio: the run fails if more than this fraction of the images is unreadable.
    """

    init_from: str | None = None
    encoder: EncoderFinetuningConfig = field(default_factory=EncoderFinetuningConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(epochs=10, optimizer="adam", learning_rate=1e-4)
    )
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    max_words: PositiveInt = 30
    batch_images: PositiveInt = 16
    horizontal_flip: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    best_by: Literal["perplexity", "cider"] = "perplexity"
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    max_failure_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05


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
    """Fine-tunes a captioner and its encoder on the images of a manifest, or resumes an interrupted run.

    Unreadable images are skipped and listed in the run's folder. `weights` is the encoder's weights file, if the
    captioner was trained on features of such a file. The checkpoint of the best epoch contains the encoder. The other
    arguments and the result are those of `train_captioner`.

    Raises:
        CheckpointError: `init_from` is not a checkpoint, or the weights belong to another encoder.
        ConfigError: `init_from` is missing, or no layer of the encoder is left to fine-tune.
        DatasetError: the manifest is incomplete, or a split has no captions.
        FailureRatioError: more images are unreadable than the configuration allows.
    """
    if config.init_from is None:
        raise ConfigError(
            "init_from: expected a captioner to fine-tune together with its encoder, got none; train one on features "
            "first"
        )
    folder = Folder(output)
    dataset = open_dataset(manifest, "manifest").require_complete()
    require_other_folder(config.init_from, folder)
    initial = load_captioner(config.init_from)
    with join_process_group(resolve_device(device)) as target:
        group = ProcessGroup()
        encoder = _load_trainable_encoder(initial, weights, config.encoder.from_node, target)
        group.run_on_first(lambda: claim_folder(folder, overwrite))
        training = read_captioned_rows(dataset, config.train_splits)
        validation = read_captioned_rows(dataset, config.validation_splits)
        resolved = {
            "manifest": dataset.fingerprint,
            "world_size": group.world_size,
            "init_from_fingerprint": initial.fingerprint,
            **to_dict(config),
        }
        origin = {"checkpoint": config.init_from, "fingerprint": initial.fingerprint}
        provenance = {"manifest": dataset.fingerprint, "init_from": origin}
        skipped = SkippedImages(folder, group.rank, len(training) + len(validation), config.max_failure_ratio)
        seed_everything(config.training.seed)
        with open_loader(config.loading, encoder.preprocessing) as load:
            objective = _make_objective(config, initial, encoder, provenance, training, validation, load, skipped)
            try:
                return train(objective, config.training, folder, resolved, progress)
            finally:
                skipped.write()
                if len(skipped):
                    print(f"{skipped.describe()}: see {folder.address(FAILURES_FOLDER)}", file=sys.stderr)


def _load_trainable_encoder(
    initial: LoadedCaptioner, weights: str | None, from_node: str | None, device: torch.device
) -> Encoder:
    """Loads the captioner's encoder with gradients from a node on."""
    config = EncoderConfig.from_description(initial.encoder, weights or initial.encoder_weights)
    encoder = load_encoder(config, str(device), trainable=True)
    initial.require_encoder(encoder.description)
    frozen = set() if from_node is None else list_parameters_before(config.model, from_node)
    parameters = dict(encoder.network.network.named_parameters())
    if set(parameters) <= frozen:
        raise ConfigError(
            f"encoder.from_node: expected a node with weights up to {config.node}, the last node of the encoder, got "
            f"{from_node}; choose an earlier node"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    return encoder


def _make_objective(
    config: FinetuningConfig,
    initial: LoadedCaptioner,
    encoder: Encoder,
    provenance: dict[str, Any],
    training: pa.Table,
    validation: pa.Table,
    load: LoadImages,
    skipped: SkippedImages,
) -> CaptioningObjective[ImageCaptioner]:
    vocabulary = initial.vocabulary
    encode = make_encoder(vocabulary, config.max_words)
    model = ImageCaptioner(encoder.network, initial.model.to(encoder.device))
    batches = ImageBatches(training, encode, config.batch_images, load, skipped, config.horizontal_flip)
    validation_batches = ImageBatches(validation, encode, config.batch_images, load, skipped)
    cider = None
    if config.best_by == "cider":
        cider = CiderValidation(validation_batches, validation["captions"].to_pylist(), vocabulary, config.decoding)

    def save(output: Folder, model: ImageCaptioner, history: dict[str, Any]) -> None:
        weights = model.encoder.export_weights()
        save_captioner(
            output,
            model.captioner,
            vocabulary,
            describe_finetuned_encoder(encoder.description, weights),
            provenance=stamp_provenance(provenance),
            training=history,
            encoder_weights=serialize_weights(weights, encoder.preprocessing),
        )

    rates = {"encoder": config.encoder.learning_rate}
    return CaptioningObjective(model, batches, validation_batches, save, config.label_smoothing, cider, rates)
