"""From captions, wherever they stand, to all that is told of them: scores, intervals, counts, and what is left out."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import ConfigError
from captionlib.evaluation.bootstrap import BootstrapConfig
from captionlib.evaluation.caption_scores import WITHOUT_JAVA, CaptionScores, score_captions
from captionlib.evaluation.diversity import IN_TRAINING, count_variety, describe_captions, read_sentences
from captionlib.evaluation.perplexity import measure_perplexity
from captionlib.evaluation.predictions import Prediction, join_references, read_predictions, select_splits

__all__ = ["TRAIN_SPLITS", "Evaluation", "evaluate_captions", "evaluate_predictions", "load_predictions"]

TRAIN_SPLITS = ("train", "restval")


@dataclass(frozen=True)
class Evaluation:
    """What was found out about captions.

    Attributes:
        predictions: what was judged.
        scores: of the captions; see `CaptionScores`.
        counts: different captions, and different words in them.
        bootstrap: how the confidence intervals were made.
        notes: what is missing, and why.
    """

    predictions: Sequence[Prediction]
    scores: CaptionScores
    counts: Mapping[str, int]
    bootstrap: BootstrapConfig
    notes: Sequence[str]

    @property
    def captions(self) -> dict[str, str]:
        """By image id, in the order of the scores' images."""
        return {one.image_id: one.caption for one in self.predictions}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `scores.json`."""
        return {
            "images": self.scores.images,
            "tokenizer": self.scores.tokenizer,
            "scores": dict(self.scores.scores),
            "intervals": {name: list(ends) for name, ends in self.scores.intervals.items()},
            "counts": dict(self.counts),
            "bootstrap": {
                "samples": self.bootstrap.samples,
                "confidence": self.bootstrap.confidence,
                "seed": self.bootstrap.seed,
            },
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
    bootstrap: BootstrapConfig | None = None,
    device: str = "auto",
) -> Evaluation:
    """Judges captions against the sentences of people.

    Args:
        source: a captions dataset, COCO's results JSON or NeuralTalk's `result_struct.json`.
        manifest: where the sentences of people are; may be left out for files that bring them along.
        splits: the splits to judge; empty takes all.
        train_splits: the splits that the captioner learned from.
        checkpoint: the captioner, to tell the perplexity of the references; with `features`.
        features: of the images.
        bootstrap: of the confidence intervals.
        device: where the captioner runs.

    Raises:
        ConfigError: only one of `checkpoint` and `features` is given, or Java fails.
        DatasetError: there are no such captions, or they have no references.
    """
    notes = [] if manifest else ["without a manifest the share of captions that training has is not known"]
    training: Iterable[str] = ()
    if manifest is not None:
        training = read_sentences(open_dataset(manifest, "manifest").require_complete(), train_splits)
    found = evaluate_predictions(
        load_predictions(source, manifest, splits),
        training=training,
        checkpoint=checkpoint,
        features=features,
        bootstrap=bootstrap,
        device=device,
    )
    if manifest is not None and IN_TRAINING not in found.scores.scores:
        notes.append(
            f"the manifest has no sentences in split {' or '.join(train_splits)}: the share of captions that "
            "training has is not known"
        )
    return replace(found, notes=[*found.notes, *notes])


def load_predictions(
    source: str | os.PathLike[str], manifest: str | os.PathLike[str] | None = None, splits: Sequence[str] = ()
) -> list[Prediction]:
    """Captions with what is known of their images, in their order; arguments and errors as of `evaluate_captions`."""
    predictions = read_predictions(source)
    if manifest is not None:
        predictions = join_references(predictions, open_dataset(manifest, "manifest").require_complete())
    return select_splits(predictions, splits, os.fspath(source))


def evaluate_predictions(
    predictions: Sequence[Prediction],
    *,
    training: Iterable[str] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    features: str | os.PathLike[str] | None = None,
    bootstrap: BootstrapConfig | None = None,
    device: str = "auto",
) -> Evaluation:
    """Judges predictions that have references.

    Args:
        predictions: what is judged.
        training: the sentences that the captioner learned from, where they are known.
        checkpoint: see `evaluate_captions`, and there for the rest and for errors.
        features: likewise.
        bootstrap: likewise.
        device: likewise.
    """
    if (checkpoint is None) != (features is None):
        raise ConfigError("perplexity: expected a checkpoint and features, got one of them; give both or neither")
    bootstrap = bootstrap or BootstrapConfig()
    # In the order of their ids, so that the same captions have the same intervals wherever they were read from.
    predictions = sorted(predictions, key=lambda one: one.image_id)
    captions = {one.image_id: one.caption for one in predictions}
    references = {one.image_id: one.references for one in predictions}
    more = describe_captions(captions, training)
    if checkpoint is not None and features is not None:
        more.insert(0, measure_perplexity(checkpoint, features, references, device))
    scores = score_captions(captions, references, more=more, bootstrap=bootstrap)
    notes = [] if scores.tokenizer == "ptb" else [WITHOUT_JAVA]
    return Evaluation(predictions, scores, count_variety(captions), bootstrap, notes)
