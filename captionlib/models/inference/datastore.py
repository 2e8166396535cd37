"""Has a captioner remember the images that it learned from."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import DatasetError
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner
from captionlib.models.decoding.datastore import DatastoreEntries, datastore_schema, write_datastore
from captionlib.models.devices import halve_on_out_of_memory, resolve_device
from captionlib.models.inference.feature_source import open_feature_source, resolve_encoder
from captionlib.progress import progress_bar

__all__ = ["DatastoreConfig", "build_datastore"]


@dataclass(frozen=True)
class DatastoreConfig:
    """What a captioner remembers.

    Attributes:
        splits: which rows: those that it learned from. What people say of an image that is to be captioned does not
            belong there.
        loading: how images are fetched and decoded, where they are not features already.
        encoder_batch_size: images a batch of the encoder, likewise.
    """

    splits: tuple[str, ...] = ("train", "restval")
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    encoder_batch_size: int = 32


def build_datastore(
    source: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    config: DatastoreConfig,
    *,
    weights: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> tuple[int, int]:
    """Writes the memory of a captioner into its folder, in place of one that is there.

    Args:
        source: a complete features dataset; or a manifest, whose images are then encoded in the same pass.
        checkpoint: the captioner's folder.
        config: what it remembers.
        weights: the encoder's weights file, where the captioner learned from features of such a file.
        device: auto, cpu, cuda or cuda:N.
        progress: show a bar.

    Returns:
        How many images it remembers, and how many could not be read.

    Raises:
        CheckpointError: no captioner there, or the features are of another encoder than its own.
        DatasetError: the source is not complete, has no sentences in these splits, or none of their images can be read.
    """
    rows = open_dataset(source).require_complete()
    captioner = load_captioner(checkpoint, str(resolve_device(device)))
    encoder = resolve_encoder(rows, captioner, weights, device, None)
    total = sum(batch.num_rows for batch in _read(rows, config.splits))
    if not total:
        raise DatasetError(
            f"{rows.folder.uri}: expected images with sentences in split {' or '.join(config.splits)}, got none; "
            "name those that the captioner learned from, such as --set splits=[train]"
        )
    columns = ["image_id", "uri"] if encoder else ["image_id", "features"]
    failed: list[str] = []

    def remembered() -> Iterator[DatastoreEntries]:
        with (
            open_feature_source(
                encoder, captioner.encoder, config.loading, config.encoder_batch_size, device, None
            ) as load_features,
            progress_bar("build-datastore", total, "images", progress) as bar,
        ):
            wanted = _read(rows, config.splits, columns)
            for some, features in load_features(wanted, lambda image_id, _uri, _error: failed.append(image_id)):
                bar.update(len(some))
                yield DatastoreEntries(
                    [row["image_id"] for row in some],
                    _vectors(captioner, torch.from_numpy(features.astype(np.float32))).numpy(),
                    [_encode(captioner, row["captions"]) for row in some],
                )
            if len(failed) == total:
                raise DatasetError(f"{rows.folder.uri}: none of {total:,} images could be read, such as {failed[0]}")

    write_datastore(checkpoint, datastore_schema(captioner, rows.fingerprint, config.splits), remembered())
    return total - len(failed), len(failed)


def _read(rows: ShardedDataset, splits: Sequence[str], columns: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """The rows of these splits that have sentences, with these columns besides."""
    for shard in range(rows.shards):
        for batch in rows.read_batches(shard, ["split", "captions", *columns]):
            has_any = pc.greater(pc.list_value_length(batch["captions"]), 0)
            kept = batch.filter(pc.and_(pc.is_in(batch["split"], pa.array(splits, pa.string())), has_any))
            if kept.num_rows:
                yield kept


@torch.inference_mode()
def _vectors(captioner: LoadedCaptioner, features: torch.Tensor) -> torch.Tensor:
    device = captioner.model.output.weight.device

    def vectors_of(part: slice) -> torch.Tensor:
        return captioner.model.encode_images(features[part].to(device)).vector.cpu()

    return torch.cat(halve_on_out_of_memory(vectors_of, len(features)))


def _encode(captioner: LoadedCaptioner, captions: Sequence[str]) -> list[list[int]]:
    return [captioner.vocabulary.encode(caption) for caption in captions]
