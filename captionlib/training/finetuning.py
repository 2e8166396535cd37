"""Fine-tunes a captioner and its encoder on a manifest, a dataset that lists images and their reference captions.

The captioner must first be trained on extracted features, because the gradients of an untrained captioner would damage
the encoder. The encoder has its own learning rate (1e-5 in neuraltalk2) and stays in evaluation mode.
"""

import os
import sys
from dataclasses import field
from typing import Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from captionlib.config import configclass, to_dict
from captionlib.data.batches.captions import make_caption_tokenizer
from captionlib.data.batches.images import ImageBatches, read_captioned_rows
from captionlib.data.batches.skipped import SkippedImages
from captionlib.data.images.loading import LoadImages, LoadingConfig, open_loader
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import FAILURES_FOLDER
from captionlib.data.text.vocabulary import END
from captionlib.errors import ConfigError
from captionlib.models.captioners.end_to_end import ImageCaptioner
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner, save_captioner
from captionlib.models.checkpoints.folder import add_versions_and_time
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import Encoder, describe_finetuned_encoder, load_encoder
from captionlib.models.encoders.network import list_parameters_before
from captionlib.models.encoders.weights import serialize_weights
from captionlib.storage.folders import Folder
from captionlib.training.caption_objective import CaptioningObjective, CiderValidation
from captionlib.training.distributed import ProcessGroup, join_process_group
from captionlib.training.initialization import describe_training_data, require_other_folder
from captionlib.training.loop import TrainingConfig, train
from captionlib.training.state import check_run_folder, delete_run

__all__ = ["EncoderFinetuningConfig", "FinetuningConfig", "finetune_captioner"]


@configclass
class EncoderFinetuningConfig:
    """How to fine-tune the encoder.

    Attributes:
        learning_rate: the base learning rate of the encoder; `training.learning_rate` is the captioner's.
        from_node: the encoder's first node or module to fine-tune, such as `layer4`. Earlier layers are frozen, which
            saves memory. If None, all layers are fine-tuned.
    """

    learning_rate: PositiveFloat = 1e-5
    from_node: str | None = None


@configclass
class FinetuningConfig:
    """Configuration of the fine-tuning of a captioner together with its encoder.

    Attributes:
        init_from: the checkpoint of the captioner. Its vocabulary, architecture and encoder are kept.
        encoder: settings of the encoder's fine-tuning.
        training: settings of the training loop, including the captioner's learning rate.
        train_splits: the training splits; `restval` is the part of COCO's validation set that is used for training.
        validation_splits: the splits that select the best epoch.
        max_words: words or characters after which training truncates a caption. If None, 30 words or 200 characters.
        batch_images: images per batch in each process. The batch contains all captions of these images.
        horizontal_flip: flip each image with probability 0.5.
        label_smoothing: the fraction of the probability of each reference token that is spread over the vocabulary.
        best_by: the score that selects the best epoch, `perplexity` or the `cider` of generated captions (needs Java).
        decoding: how to generate captions for CIDEr.
        loading: how to fetch and decode images.
        max_failure_ratio: the maximum fraction of unreadable images; if it is exceeded, the run fails. If None, the run
            fails only if all images are unreadable.
    """

    init_from: str | None = None
    encoder: EncoderFinetuningConfig = field(default_factory=EncoderFinetuningConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(epochs=10, optimizer="adam", learning_rate=1e-4)
    )
    train_splits: tuple[str, ...] = ("train", "restval")
    validation_splits: tuple[str, ...] = ("val", "dev")
    max_words: PositiveInt | None = None
    batch_images: PositiveInt = 16
    horizontal_flip: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    best_by: Literal["perplexity", "cider"] = "perplexity"
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    max_failure_ratio: Annotated[float, Field(ge=0, le=1)] | None = None


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
    encoder was loaded from one. The checkpoint of the best epoch includes the encoder. The other arguments and the
    result are the same as for `train_captioner`.

    Raises:
        CheckpointError: `init_from` is not a checkpoint, or the weights belong to a different encoder.
        ConfigError: `init_from` is missing, or no layer at or after `encoder.from_node` has weights to fine-tune.
        DatasetError: the manifest is incomplete, or the training or validation splits contain no captions.
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
    with join_process_group(resolve_device(device)) as process_device:
        group = ProcessGroup()
        encoder = _load_trainable_encoder(initial, weights, config.encoder.from_node, process_device)
        group.run_on_process_0(lambda: check_run_folder(folder))
        training = read_captioned_rows(dataset, config.train_splits)
        validation = read_captioned_rows(dataset, config.validation_splits)
        provenance = {
            **describe_training_data(dataset, config.train_splits, config.validation_splits),
            "init_from": {"checkpoint": config.init_from, "fingerprint": initial.fingerprint},
        }
        settings = {
            "manifest": provenance["manifest"],
            "world_size": group.world_size,
            "init_from_fingerprint": initial.fingerprint,
            **to_dict(config),
        }
        if overwrite:
            group.run_on_process_0(lambda: delete_run(folder))
        skipped = SkippedImages(folder, group.rank, len(training) + len(validation), config.max_failure_ratio)
        torch.manual_seed(config.training.seed)
        with open_loader(config.loading, encoder.preprocessing) as load:
            objective = _make_objective(config, initial, encoder, provenance, training, validation, load, skipped)
            try:
                return train(objective, config.training, folder, settings, progress)
            finally:
                skipped.write()
                if len(skipped):
                    print(f"{skipped.describe()}: see {folder.address(FAILURES_FOLDER)}", file=sys.stderr)


def _load_trainable_encoder(
    initial: LoadedCaptioner, weights: str | None, from_node: str | None, device: torch.device
) -> Encoder:
    """Loads the captioner's encoder and freezes the layers before `from_node`."""
    encoder_config = initial.find_input_transform(weights)
    encoder = load_encoder(encoder_config, str(device), trainable=True)
    initial.require_encoder(encoder.description)
    frozen = set() if from_node is None else list_parameters_before(encoder_config.model, from_node)
    parameters = dict(encoder.network.network.named_parameters())
    if set(parameters) <= frozen:
        raise ConfigError(
            f"encoder.from_node: expected at least one layer with weights at or after {from_node}, got none, because "
            f"the encoder ends at {encoder_config.node}; choose an earlier node"
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
    encode = make_caption_tokenizer(vocabulary, config.max_words)
    model = ImageCaptioner(encoder.network, initial.model.to(encoder.device))
    batches = ImageBatches(training, encode, config.batch_images, load, skipped, config.horizontal_flip)
    validation_batches = ImageBatches(validation, vocabulary.encode, config.batch_images, load, skipped)
    cider = None
    if config.best_by == "cider":
        cider = CiderValidation(validation_batches, validation["captions"].to_pylist(), vocabulary, config.decoding)

    def save(output: Folder, history: dict[str, Any]) -> None:
        weights = model.encoder.export_weights()
        save_captioner(
            output,
            model.captioner,
            vocabulary,
            describe_finetuned_encoder(encoder.description, weights),
            provenance=add_versions_and_time(provenance),
            training=history,
            encoder_weights=serialize_weights(weights, encoder.preprocessing),
        )

    rates = {"encoder": config.encoder.learning_rate}
    objective = CaptioningObjective(model, batches, validation_batches, save, config.label_smoothing, cider, rates)
    objective.unigram_perplexity = vocabulary.unigram_perplexity(
        [*vocabulary.encode(caption), END] for captions in validation["captions"].to_pylist() for caption in captions
    )
    return objective
