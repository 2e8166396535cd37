"""Compares two sets of captions of the same images: score by score, with paired confidence intervals, and per image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from captionlib.errors import DatasetError
from captionlib.evaluation.bootstrap import BootstrapConfig, compare_scores
from captionlib.evaluation.evaluate import Evaluation, evaluate_predictions
from captionlib.evaluation.predictions import Prediction

__all__ = ["ComparedScore", "Comparison", "compare_predictions"]

_HIGHER_IS_BETTER = ("BLEU", "METEOR", "ROUGE", "CIDEr")  # other scores, such as the mean length, are neutral
_TIE = 0.00005  # smaller differences are ties, because scores are displayed with four decimals


@dataclass(frozen=True)
class ComparedScore:
    """A score of the captions and of the baseline. `low` and `high` bound the interval of the difference."""

    name: str
    value: float
    baseline: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.value - self.baseline

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval excludes 0. Empty otherwise, and for neutral scores."""
        if not self.name.startswith(_HIGHER_IS_BETTER) or self.low <= 0 <= self.high:
            return ""
        return "better" if self.low > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """A comparison of captions with baseline captions of the same images. Mappings are keyed by image id."""

    names: tuple[str, str]  # of the captions and of the baseline
    predictions: Sequence[Prediction]  # captions of the images that both have
    baseline: Mapping[str, Prediction]
    scores: Sequence[ComparedScore]  # over the images with references
    cider: Mapping[str, float]
    baseline_cider: Mapping[str, float]
    not_compared: tuple[int, int]  # numbers of images that only the captions, and that only the baseline has
    notes: Sequence[str]  # on missing or unreliable scores

    @property
    def wins_ties_losses(self) -> tuple[int, int, int]:
        """The numbers of images whose caption has a higher, an equal and a lower CIDEr than that of the baseline."""
        differences = [value - self.baseline_cider[image_id] for image_id, value in self.cider.items()]
        better, worse = (sum(sign * each >= _TIE for each in differences) for sign in (1, -1))
        return better, len(differences) - better - worse, worse

    @property
    def different_captions(self) -> int:
        return sum(each.caption != self.baseline[each.image_id].caption for each in self.predictions)


def compare_predictions(
    predictions: Sequence[Prediction],
    baseline: Sequence[Prediction],
    names: tuple[str, str],
    bootstrap: BootstrapConfig = BootstrapConfig(),
) -> Comparison:
    """Compares captions with a baseline, on the images that both have.

    The references of an image are those in `predictions` or, if there are none, those in `baseline`. Images without
    references are compared, but not scored.

    Raises:
        DatasetError: the captions and the baseline have no image in common.
        SubprocessError: Java fails.
    """
    others = {each.image_id: each for each in baseline}
    shared = [each for each in predictions if each.image_id in others]
    if not shared:
        examples = [
            f"{each[0].image_id!r} in {name}" for name, each in zip(names, (predictions, baseline), strict=True) if each
        ]
        raise DatasetError(
            f"{names[0]} and {names[1]} have no image in common: expected the same image ids, got for example "
            f"{' and '.join(examples)}; compare captions that were generated for the same images"
        )
    shared = [replace(each, references=each.references or others[each.image_id].references) for each in shared]
    others = {each.image_id: replace(others[each.image_id], references=each.references) for each in shared}
    scored = [each for each in shared if each.references]
    sets = [scored, [others[each.image_id] for each in scored]] if scored else []
    evaluations = [evaluate_predictions(each, bootstrap=bootstrap) for each in sets]
    return Comparison(
        names=names,
        predictions=shared,
        baseline=others,
        scores=_compare(*evaluations) if evaluations else [],
        cider=evaluations[0].scores.per_image["CIDEr"] if evaluations else {},
        baseline_cider=evaluations[1].scores.per_image["CIDEr"] if evaluations else {},
        not_compared=(len(predictions) - len(shared), len(baseline) - len(shared)),
        notes=evaluations[0].notes if evaluations else [],
    )


def _compare(evaluation: Evaluation, baseline: Evaluation) -> list[ComparedScore]:
    intervals = compare_scores(evaluation.scores, baseline.scores, evaluation.bootstrap)
    values, others = evaluation.scores.overall, baseline.scores.overall
    return [ComparedScore(name, values[name], others[name], *interval) for name, interval in intervals.items()]
