"""Builds the datastore of a captioner: features and references of its training images, for reranking."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import PositiveInt

from captionlib.config import configclass
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.splits import add_split_aliases
from captionlib.errors import DatasetError
from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.datastore import DatastoreRows, write_datastore
from captionlib.models.devices import halve_on_out_of_memory, resolve_device
from captionlib.models.inference.model_inputs import choose_input_transform, open_input_loader
from captionlib.progress import progress_bar

__all__ = ["DatastoreConfig", "build_datastore"]


@configclass
class DatastoreConfig:
    """Configuration of a datastore.

    Attributes:
        splits: splits that the captioner was trained on. Leave out splits that you will caption, because their
            references would leak into the captions.
        loading: how to fetch and decode images, if the source is a manifest (list of images).
        encoder_batch_size: images per batch of the encoder, if the source is a manifest.
    """

    splits: tuple[str, ...] = ("train", "restval")
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    encoder_batch_size: PositiveInt = 32


def build_datastore(
    source: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    config: DatastoreConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> tuple[int, int]:
    """Builds the datastore of a captioner and replaces the one in its checkpoint, if there is one.

    `source` is a complete features dataset or manifest. `weights` is the path of the encoder's weights file, if it is
    not in the checkpoint.

    Returns:
        The number of images in the datastore, and the number of images that could not be read.

    Raises:
        CheckpointError: the checkpoint is not a captioner, or the features come from a different encoder.
        DatasetError: the source is incomplete or has no references in these splits, or none of its images can be read.
    """
    dataset = open_dataset(source).require_complete()
    captioner = load_captioner(checkpoint, str(resolve_device(device)))
    input_transform = choose_input_transform(dataset, captioner, weights, device, threads=None)
    total = sum(batch.num_rows for batch in _read_batches(dataset, config.splits))
    if not total:
        raise DatasetError(
            f"{dataset.folder.uri}: expected images with captions in split {' or '.join(config.splits)}, got none; "
            "specify the splits that the captioner was trained on, such as --set splits=[train]"
        )
    columns = ["image_id", "uri"] if input_transform else ["image_id", "features"]
    failed: list[str] = []

    def encode_rows() -> Iterator[DatastoreRows]:
        with (
            open_input_loader(
                [input_transform], [captioner], config.loading, config.encoder_batch_size, device, None
            ) as load_features,
            progress_bar("build-datastore", total, "images", progress) as bar,
        ):
            batches = _read_batches(dataset, config.splits, columns)
            for rows, (features,) in load_features(batches, lambda row, _error: failed.append(row["image_id"])):
                bar.update(len(rows))
                yield (
                    [row["image_id"] for row in rows],
                    _compute_vectors(captioner.model, torch.from_numpy(np.asarray(features, np.float32))).numpy(),
                    [[captioner.vocabulary.encode(caption) for caption in row["captions"]] for row in rows],
                )
            if len(failed) == total:
                raise DatasetError(
                    f"{dataset.folder.uri}: none of the {total:,} images could be read; an example is {failed[0]}"
                )

    write_datastore(checkpoint, captioner, dataset.compute_content_checksum(), config.splits, encode_rows())
    return total - len(failed), len(failed)


def _read_batches(
    dataset: ShardedDataset, splits: Sequence[str], columns: Sequence[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Yields the rows that are in `splits` and have captions, with the columns split, captions and `columns`."""
    wanted = pa.array(add_split_aliases(splits), pa.string())
    for shard in range(dataset.shards):
        for batch in dataset.read_batches(shard, ["split", "captions", *columns]):
            has_captions = pc.greater(pc.list_value_length(batch["captions"]), 0)
            selected = batch.filter(pc.and_(pc.is_in(batch["split"], wanted), has_captions))
            if selected.num_rows:
                yield selected


@torch.inference_mode()
def _compute_vectors(model: CaptionerNetwork, features: torch.Tensor) -> torch.Tensor:
    """Returns `ImageState.features` on the CPU."""
    device = model.output.weight.device

    def encode(part: slice) -> torch.Tensor:
        return model.encode_images(features[part].to(device)).features.cpu()

    return torch.cat(halve_on_out_of_memory(encode, len(features)))
