"""Computes the perplexity that a captioner assigns to the references of images."""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.errors import CheckpointError, DatasetError
from captionlib.evaluation.metrics import Metric, compute_ratio
from captionlib.models.families.captioner import SentenceScorer, open_captioner
from captionlib.models.inference.model_inputs import choose_input_transform, open_input_loader

__all__ = ["measure_perplexity"]

_BATCH_IMAGES = 32


def measure_perplexity(
    checkpoint: str | os.PathLike[str],
    images: str | os.PathLike[str],
    references: Mapping[str, Sequence[str]],
    device: str = "auto",
) -> Metric:
    """Computes the perplexity of references, exp(-sum ln p / sum (length + 1)), where + 1 counts the end token.

    `images` is a dataset of encoder features, or a manifest (list of images), whose images are encoded. The metric has
    one row per image, in the order of `references`. References without words are ignored.

    Raises:
        CheckpointError: the folder contains no captioner, the captioner cannot score sentences, or the features
            come from a different encoder than its own.
        DatasetError: an image has no features, or cannot be read.
    """
    captioner = open_captioner(checkpoint, device)
    if not isinstance(captioner, SentenceScorer):
        raise CheckpointError(
            f"{os.fspath(checkpoint)}: this captioner does not compute the probability of given sentences; leave "
            "--checkpoint out"
        )
    dataset = open_dataset(images).require_complete()
    transform = choose_input_transform(dataset, captioner, weights=None, device=device, threads=None)
    sums: dict[str, tuple[float, int]] = {}
    with open_input_loader([transform], [captioner], LoadingConfig(), _BATCH_IMAGES, device, threads=None) as load:
        for rows, (inputs,) in load(_read_referenced(dataset, references), lambda _row, _error: None):
            ids = [row["image_id"] for row in rows]
            scores = captioner.score_sentences(inputs, [references[image_id] for image_id in ids])
            for image_id, sentences in zip(ids, scores, strict=True):
                sums[image_id] = -sum(log_prob for log_prob, _ in sentences), sum(count for _, count in sentences)
    if missing := [image_id for image_id in references if image_id not in sums]:
        reason = "have no features" if dataset.kind == "features" else "cannot be read"
        raise DatasetError(
            f"{dataset.folder.uri}: {len(missing)} of {len(references)} images {reason}, such as {missing[0]}; pass "
            "features or a manifest that include all evaluated images"
        )
    losses, token_counts = zip(*(sums[image_id] for image_id in references), strict=True)
    return compute_ratio("perplexity", losses, token_counts, np.exp)


def _read_referenced(dataset: ShardedDataset, references: Mapping[str, Sequence[str]]) -> Iterator[pa.RecordBatch]:
    wanted = pa.array(references, pa.string())
    columns = ["image_id", "features"] if dataset.kind == "features" else list(MANIFEST_SCHEMA.names)
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, columns, _BATCH_IMAGES):
            selected = rows.filter(pc.is_in(rows["image_id"], value_set=wanted))
            if len(selected):
                yield selected
