import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor.meteor import Meteor

from captionlib.errors import ConfigError
from captionlib.evaluation.bootstrap import BootstrapConfig, compute_scores
from captionlib.evaluation.metrics import compute_bleu, compute_cider, compute_meteor, compute_ratio

WORDS = ["a", "dog", "cats", "run", "the", "on", "grass", "man", "walking", "beach", "two", "of", "quickly", "large"]

sentences = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
sets = st.dictionaries(
    st.text(max_size=3), st.tuples(sentences, st.lists(sentences, min_size=1, max_size=4)), min_size=1
)


def split(pairs: dict[str, tuple[str, list[str]]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    return {i: [caption] for i, (caption, _) in pairs.items()}, {i: references for i, (_, references) in pairs.items()}


def generate_pairs(count: int) -> dict[str, tuple[str, list[str]]]:
    rng = random.Random(3)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))

    pairs = {str(n): (sentence(), [sentence() for _ in range(5)]) for n in range(count)}
    return {**pairs, "same": ("a big dog", ["a big dog", "two men"]), "none": ("", ["a dog"])}


@settings(max_examples=50, deadline=None)
@given(sets)
def test_bleu_equals_pycocoevalcap_for_the_set_and_each_image(pairs: dict[str, tuple[str, list[str]]]) -> None:
    captions, references = split(pairs)
    expected, expected_per_image = Bleu(4).compute_score(references, captions, verbose=0)
    metric = compute_bleu(captions, references)
    assert metric.formula(metric.rows.sum(0)) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(metric.formula(metric.rows).T, expected_per_image, atol=1e-12)


def test_meteor_equals_its_java_program_for_the_set_and_each_image() -> None:
    captions, references = split(generate_pairs(200))
    expected, expected_per_image = Meteor().compute_score(references, captions)
    metric = compute_meteor(captions, references)
    assert metric.formula(metric.rows.sum(0)) == pytest.approx(expected, abs=1e-12)
    assert metric.formula(metric.rows)[:, 0] == pytest.approx(expected_per_image, abs=1e-12)


def test_bleu_of_resampled_rows_equals_bleu_of_resampled_images() -> None:
    pairs = generate_pairs(20)
    captions, references = split(pairs)
    metric = compute_bleu(captions, references)
    ids = list(pairs)
    resample = np.random.default_rng(7).integers(len(ids), size=len(ids))
    repeated = {str(n): pairs[ids[index]] for n, index in enumerate(resample)}
    expected, _ = Bleu(4).compute_score(*reversed(split(repeated)), verbose=0)
    assert metric.formula(metric.rows[resample].sum(0)) == pytest.approx(expected, abs=1e-12)


def test_interval_of_a_mean_matches_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=400)
    summary = compute_scores(
        [compute_ratio("mean", values, np.ones(400))], [str(n) for n in range(400)], BootstrapConfig(samples=4000)
    )
    low, high = summary.intervals["mean"]
    error = 1.96 * values.std() / 400**0.5
    assert summary.overall["mean"] == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.02)


def test_metrics_share_their_resamples() -> None:
    captions, references = split(generate_pairs(30))
    metric = compute_cider(captions, references)
    config = BootstrapConfig(samples=50)
    alone = compute_scores([metric], list(captions), config)
    together = compute_scores([compute_bleu(captions, references), metric], list(captions), config)
    assert alone.intervals["CIDEr"] == pytest.approx(together.intervals["CIDEr"], abs=1e-12)


def test_scores_of_the_same_captions_are_equal() -> None:
    metric = compute_ratio("mean", [1.0, 2.0], [1.0, 1.0])
    first, second = (compute_scores([metric], ["x", "y"], BootstrapConfig(samples=10)) for _ in range(2))
    assert first == second


def test_undefined_score_is_left_out() -> None:
    summary = compute_scores([compute_ratio("perplexity", [0.0], [0.0])], ["x"], BootstrapConfig(samples=10))
    assert summary.overall == {}


@pytest.mark.parametrize("options", [{"samples": -1}, {"confidence": 1.0}])
def test_bootstrap_config_rejects_values_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="Input should be"):
        BootstrapConfig(**options)  # type: ignore[arg-type]
