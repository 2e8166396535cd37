import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor.meteor import Meteor

from captionlib.errors import ConfigError
from captionlib.evaluation.bootstrap import BootstrapConfig, summarize
from captionlib.evaluation.meteor import count_alignments
from captionlib.evaluation.metrics import bleu, cider, meteor, ratio

WORDS = ["a", "dog", "cats", "run", "the", "on", "grass", "man", "walking", "beach", "two", "of", "quickly", "large"]

sentences = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
sets = st.dictionaries(
    st.text(max_size=3), st.tuples(sentences, st.lists(sentences, min_size=1, max_size=4)), min_size=1
)


def split(pairs: dict[str, tuple[str, list[str]]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    return {i: [said] for i, (said, _) in pairs.items()}, {i: expected for i, (_, expected) in pairs.items()}


def draw(count: int) -> dict[str, tuple[str, list[str]]]:
    chance = random.Random(3)

    def sentence() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 9)))

    drawn = {str(n): (sentence(), [sentence() for _ in range(5)]) for n in range(count)}
    return {**drawn, "same": ("a big dog", ["a big dog", "two men"]), "none": ("", ["a dog"])}


@settings(max_examples=50, deadline=None)
@given(sets)
def test_bleu_of_the_set_and_of_each_image_is_pycocoevalcaps(pairs: dict[str, tuple[str, list[str]]]) -> None:
    captions, references = split(pairs)
    own, own_of_images = Bleu(4).compute_score(references, captions, verbose=0)
    metric = bleu(captions, references)
    assert metric.formula(metric.rows.sum(0)) == pytest.approx(own, abs=1e-12)
    np.testing.assert_allclose(metric.formula(metric.rows).T, own_of_images, atol=1e-12)


def test_meteor_of_the_set_and_of_each_image_is_its_own_programs() -> None:
    captions, references = split(draw(200))
    own, own_of_images = Meteor().compute_score(references, captions)
    metric = meteor(captions, references)
    assert metric.formula(metric.rows.sum(0)) == pytest.approx(own, abs=1e-12)
    assert metric.formula(metric.rows)[:, 0] == pytest.approx(own_of_images, abs=1e-12)


def test_what_separates_meteors_sentences_is_no_part_of_one() -> None:
    with_it, without = count_alignments([("a dog ||| runs", ["a ||| dog"]), ("a dog runs", ["a dog"])]).tolist()
    assert with_it == without


def test_meteor_without_java_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="METEOR score needs Java"):
        count_alignments([("a dog", ["a dog"])])


def test_a_resample_of_bleu_is_the_bleu_of_the_resampled_images() -> None:
    pairs = draw(20)
    captions, references = split(pairs)
    metric = bleu(captions, references)
    ids = list(pairs)
    drawn = np.random.default_rng(7).integers(len(ids), size=len(ids))
    repeated = {str(n): pairs[ids[index]] for n, index in enumerate(drawn)}
    own, _ = Bleu(4).compute_score(*reversed(split(repeated)), verbose=0)
    assert metric.formula(metric.rows[drawn].sum(0)) == pytest.approx(own, abs=1e-12)


def test_intervals_of_a_mean_are_those_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=400)
    summary = summarize(
        [ratio("mean", values, np.ones(400))], [str(n) for n in range(400)], BootstrapConfig(samples=4000)
    )
    low, high = summary.intervals["mean"]
    error = 1.96 * values.std() / 400**0.5
    assert summary.scores["mean"] == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.02)


def test_all_metrics_are_resampled_alike() -> None:
    captions, references = split(draw(30))
    metric = cider(captions, references)
    config = BootstrapConfig(samples=50)
    alone = summarize([metric], list(captions), config)
    beside = summarize([bleu(captions, references), metric], list(captions), config)
    assert alone.intervals["CIDEr"] == pytest.approx(beside.intervals["CIDEr"], abs=1e-12)


def test_a_score_that_has_no_value_is_left_out() -> None:
    summary = summarize([ratio("perplexity", [0.0], [0.0])], ["x"], BootstrapConfig(samples=10))
    assert summary.scores == {}


@pytest.mark.parametrize("options", [{"samples": -1}, {"confidence": 1.0}])
def test_impossible_intervals_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        BootstrapConfig(**options)  # type: ignore[arg-type]
