"""Evaluates captions: computes scores, confidence intervals and diversity, and notes which scores are missing."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from captionlib.config import to_dict
from captionlib.data.batches.captions import read_references
from captionlib.errors import ConfigError, DatasetError
from captionlib.evaluation.bootstrap import BootstrapConfig, Scores
from captionlib.evaluation.caption_scores import WITHOUT_JAVA, score_captions
from captionlib.evaluation.diversity import NOVEL, count_diversity, measure_captions
from captionlib.evaluation.java import has_java
from captionlib.evaluation.metrics import Metric
from captionlib.evaluation.perplexity import measure_perplexity
from captionlib.evaluation.predictions import Prediction, find_images_without_caption, load_predictions, open_references

__all__ = ["TRAIN_SPLITS", "Evaluation", "evaluate_captions", "evaluate_predictions"]

TRAIN_SPLITS = ("train", "restval")
"""The usual training splits. In Karpathy & Fei-Fei's splits of COCO (2015), `restval` is used for training."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    predictions: Sequence[Prediction]  # sorted by image id
    scores: Scores
    counts: Mapping[str, int]  # see `count_diversity`
    tokenizer: str  # `ptb` (Stanford's PTB tokenizer), or `captionlib` without Java
    bootstrap: BootstrapConfig
    notes: Sequence[str]  # on missing or unreliable scores

    @property
    def captions(self) -> dict[str, str]:
        return {prediction.image_id: prediction.caption for prediction in self.predictions}

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `scores.json` as JSON-compatible values."""
        return {
            "images": len(self.predictions),
            "tokenizer": self.tokenizer,
            "scores": dict(self.scores.overall),
            "intervals": {name: list(ends) for name, ends in self.scores.intervals.items()},
            "counts": dict(self.counts),
            "bootstrap": to_dict(self.bootstrap),
            "notes": list(self.notes),
        }


def evaluate_captions(
    source: str | os.PathLike[str],
    manifest: str | os.PathLike[str] | None = None,
    *,
    splits: Sequence[str] = (),
    train_splits: Sequence[str] = TRAIN_SPLITS,
    checkpoint: str | os.PathLike[str] | None = None,
    features: str | os.PathLike[str] | None = None,
    bootstrap: BootstrapConfig = BootstrapConfig(),
    require_all: bool = False,
    device: str = "auto",
) -> Evaluation:
    """Evaluates captions against references.

    Example:
        >>> evaluation = captionlib.evaluate_captions("captions", "manifest", splits=["test"])
        >>> 0 <= evaluation.scores.overall["CIDEr"] <= 10
        True

    Args:
        source: a captions dataset, COCO's results JSON, or NeuralTalk's `result_struct.json`.
        manifest: the dataset that contains the references: a manifest (list of images), or features. Optional if the
            source contains references.
        splits: the splits to evaluate. If empty, all splits are evaluated.
        train_splits: the splits that the captioner was trained on. A caption that is not among the references of these
            splits is novel.
        checkpoint: folder or address of the captioner, to compute the perplexity of the references.
        features: a dataset of image features (encoder outputs), for the perplexity; requires `checkpoint`. If None, the
            images of the manifest are encoded.
        bootstrap: how confidence intervals are computed.
        require_all: raise an error if an image with references in these splits has no caption.
        device: the device of the captioner.

    Raises:
        ConfigError: `features` is given without `checkpoint`, or `checkpoint` without features or a manifest.
        DatasetError: there are no captions in these splits, they have no references, or captions are missing and
            `require_all` is True.
        SubprocessError: Java fails.
    """
    if checkpoint is not None:
        features = features or manifest
    if (checkpoint is None) != (features is None):
        raise ConfigError(
            "perplexity: expected a checkpoint together with features or a manifest, got only one of the two; "
            "specify both or neither"
        )
    training_references: Iterable[str] = ()
    notes: list[str] = []
    predictions = _sort(load_predictions(source, manifest, splits))
    if manifest is not None:
        dataset = open_references(manifest)
        training_references = chain.from_iterable(read_references(dataset, train_splits))
        missing, count = find_images_without_caption(predictions, dataset, splits)
        if missing:
            shortfall = f"{len(missing):,} of {count:,} images with references have no caption, such as {missing[0]}"
            if require_all:
                raise DatasetError(f"{os.fspath(source)}: {shortfall}; add their captions, or omit --require-all")
            notes.append(f"{shortfall}; these images are not scored (--require-all makes this an error)")
    metrics = []
    if checkpoint is not None and features is not None:
        references = {prediction.image_id: prediction.references for prediction in predictions}
        metrics.append(measure_perplexity(checkpoint, features, references, device))
    evaluation = evaluate_predictions(predictions, training_references, metrics, bootstrap)
    if NOVEL not in evaluation.scores.overall:
        without_references = f"the manifest has no references in split {' or '.join(train_splits)}"
        reason = without_references if manifest else "no manifest was specified"
        notes.append(f"the fraction of novel captions is omitted because {reason}")
    return replace(evaluation, notes=[*evaluation.notes, *notes])


def evaluate_predictions(
    predictions: Sequence[Prediction],
    training_references: Iterable[str] = (),
    extra_metrics: Sequence[Metric] = (),
    bootstrap: BootstrapConfig = BootstrapConfig(),
) -> Evaluation:
    """Evaluates predictions (captions of images), each of which must have references. The result is sorted by image id.

    `training_references` are the references that the captioner was trained on. If there are none, the fraction of novel
    captions is omitted. Each of `extra_metrics` has one row per prediction, in the order of the image ids.
    """
    predictions = _sort(predictions)
    captions = {prediction.image_id: prediction.caption for prediction in predictions}
    references = {prediction.image_id: prediction.references for prediction in predictions}
    metrics = [*extra_metrics, *measure_captions(captions, training_references)]
    scores = score_captions(captions, references, extra_metrics=metrics, bootstrap=bootstrap)
    tokenizer, notes = ("ptb", []) if has_java() else ("captionlib", [WITHOUT_JAVA])
    if len(captions) == 1:
        notes = [*notes, "CIDEr is meaningless for one image, because it weights n-grams by their rarity among images"]
    return Evaluation(predictions, scores, count_diversity(captions), tokenizer, bootstrap, notes)


def _sort(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Sorts by image id, so that the same captions in a different order give the same confidence intervals."""
    return sorted(predictions, key=lambda prediction: prediction.image_id)
