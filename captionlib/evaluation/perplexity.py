"""Computes the perplexity that a captioner assigns to the references of images."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.batches.captions import feature_shape
from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import DatasetError
from captionlib.evaluation.metrics import Metric, compute_ratio
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner, load_captioner

__all__ = ["measure_perplexity"]

_BATCH_IMAGES = 32


def measure_perplexity(
    checkpoint: str | os.PathLike[str],
    features: str | os.PathLike[str],
    references: Mapping[str, Sequence[str]],
    device: str = "auto",
) -> Metric:
    """Computes the perplexity exp(-sum ln p / sum (length + 1)) of references; + 1 counts the end token.

    Words outside the vocabulary are scored as UNKNOWN. References without words are ignored. `references` are keyed by
    image id. The metric has one row per image in this order. `features` is a dataset of encoder features.

    Raises:
        CheckpointError: the folder is not a captioner, or the features come from a different encoder than its own.
        DatasetError: an image has no features.
    """
    captioner = load_captioner(checkpoint, device)
    dataset = open_dataset(features, "features").require_complete()
    captioner.require_encoder(dataset.config["encoder"])
    shape = feature_shape(dataset)
    sums: dict[str, tuple[float, int]] = {}
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, ["image_id", "features"], _BATCH_IMAGES):
            ids = rows["image_id"].to_pylist()
            selected = [row for row, image_id in enumerate(ids) if image_id in references]
            if selected:
                values = vectors_to_numpy(rows["features"], shape)
                batch = torch.from_numpy(values[selected].astype(np.float32))
                sums.update(_sum_losses(captioner, batch, {ids[row]: references[ids[row]] for row in selected}))
    if missing := [image_id for image_id in references if image_id not in sums]:
        raise DatasetError(
            f"{dataset.folder.uri}: {len(missing)} of {len(references)} images have no features, such as "
            f"{missing[0]}; pass features that include all evaluated images"
        )
    losses, tokens = zip(*(sums[image_id] for image_id in references), strict=True)
    return compute_ratio("perplexity", losses, tokens, np.exp)


@torch.inference_mode()
def _sum_losses(
    captioner: LoadedCaptioner, features: torch.Tensor, references: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, int]]:
    """Returns the sum of -ln p over the tokens of each image's references, and the number of tokens, by image id.

    `features` are `[images, *shape] float32`, with the images in the order of `references`.
    """
    sentences, image_of_sentence = [], []
    for image, texts in enumerate(references.values()):
        for text in texts:
            if token_ids := captioner.vocabulary.encode(text):
                sentences.append(token_ids)
                image_of_sentence.append(image)
    losses, tokens = np.zeros(len(features)), np.zeros(len(features), np.int64)
    if sentences:
        device = next(captioner.model.parameters()).device
        rows = torch.tensor(image_of_sentence)
        scores = captioner.model(features.to(device), pad_sentences(sentences).to(device), rows.to(device))
        image_of_token = rows[scores.sentences.cpu()].numpy()
        np.add.at(losses, image_of_token, -scores.log_probs.double().cpu().numpy())
        np.add.at(tokens, image_of_token, 1)
    return dict(zip(references, zip(losses.tolist(), tokens.tolist(), strict=True), strict=True))
