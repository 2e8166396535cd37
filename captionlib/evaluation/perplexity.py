"""How likely a captioner finds what people said: the perplexity of the references, image by image."""

import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from captionlib.data.arrays import vectors_to_numpy
from captionlib.data.batches.captions import feature_shape
from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import DatasetError
from captionlib.evaluation.metrics import Metric, ratio
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
    """The perplexity exp(-sum ln p / sum (length + 1)) of references under a captioner.

    Words that the captioner does not know count as UNKNOWN; a sentence without any word is left out.

    Args:
        checkpoint: the captioner's folder.
        features: the features dataset that holds the images.
        references: by image id.
        device: where the captioner runs.

    Returns:
        A row for each image of `references`, in that order.

    Raises:
        CheckpointError: there is no captioner, or it learned from features of another encoder.
        DatasetError: an image has no features.
    """
    captioner = load_captioner(checkpoint, device)
    dataset = open_dataset(features, "features").require_complete()
    captioner.require_encoder(dataset.config["encoder"])
    shape = feature_shape(dataset)
    found: dict[str, tuple[float, int]] = {}
    for shard in range(dataset.shards):
        for rows in dataset.read_batches(shard, ["image_id", "features"], _BATCH_IMAGES):
            ids = rows["image_id"].to_pylist()
            kept = [number for number, image_id in enumerate(ids) if image_id in references]
            if kept:
                numbers = vectors_to_numpy(rows["features"], shape)
                images = torch.from_numpy(numbers[kept].astype(np.float32))
                found.update(_score(captioner, images, {ids[n]: references[ids[n]] for n in kept}))
    _require_all(found, references, dataset.folder.uri)
    losses, tokens = zip(*(found[image_id] for image_id in references), strict=True)
    return ratio("perplexity", losses, tokens, np.exp)


@torch.inference_mode()
def _score(
    captioner: LoadedCaptioner, features: torch.Tensor, references: Mapping[str, Sequence[str]]
) -> dict[str, tuple[float, int]]:
    """The sum of -ln p and the number of tokens, of each image's references.

    Args:
        captioner: whose probabilities.
        features: `[images, *shape] float32`.
        references: of these images, in the same order.
    """
    sentences, image_of_sentence = [], []
    for number, texts in enumerate(references.values()):
        for text in texts:
            if words := captioner.vocabulary.encode(text):
                sentences.append(words)
                image_of_sentence.append(number)
    losses, tokens = np.zeros(len(features)), np.zeros(len(features), np.int64)
    if sentences:
        device = next(captioner.model.parameters()).device
        rows = torch.tensor(image_of_sentence)
        scores = captioner.model(features.to(device), pad_sentences(sentences).to(device), rows.to(device))
        image_of_token = rows[scores.sentences.cpu()].numpy()
        np.add.at(losses, image_of_token, -scores.log_probs.double().cpu().numpy())
        np.add.at(tokens, image_of_token, 1)
    return dict(zip(references, zip(losses.tolist(), tokens.tolist(), strict=True), strict=True))


def _require_all(found: Collection[str], references: Mapping[str, Sequence[str]], folder: str) -> None:
    missing = [image_id for image_id in references if image_id not in found]
    if missing:
        raise DatasetError(
            f"{folder}: {len(missing)} of {len(references)} images have no features, the first is {missing[0]}; "
            "give the features that the captions were made from"
        )
