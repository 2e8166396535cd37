import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.decoder import Candidate, Decoder, DecodingConfig
from captionlib.models.decoding.rerank import Neighbors, order_by_consensus
from tests.models.tiny_captioners import build, configs, features, seeds


def candidate(words: list[int], log_prob: float) -> Candidate:
    return Candidate(words, log_prob, len(words) + 1)


ALIKE = CiderD()  # all n-grams of the same weight


def test_what_others_resemble_comes_before_what_is_likelier() -> None:
    odd = candidate([10, 9, 8, 7], math.log(0.3))
    alike = [candidate([2, 3, 4, 5], math.log(0.25)), candidate([2, 3, 4, 6], math.log(0.2))]
    assert order_by_consensus([odd, *alike], 1, ALIKE) == [*alike, odd]


def test_agreement_is_cider_weighed_by_probability() -> None:
    a, b = candidate([2, 3], 0.0), candidate([2, 4], 0.0)
    # They share one word of two; c shares nothing, and agrees with itself in words and pairs: 1 of each.
    of_a_with_b, of_itself = 1 / 4 * 1 / 2, 2 / 4
    # a comes first until c is so much likelier that it outweighs what a has of b and itself.
    even = math.log((of_itself + of_a_with_b) / of_itself)
    for more, first in ((-0.01, [2, 3]), (0.01, [5, 6])):
        likely = candidate([5, 6], 2 * (even + more))
        assert order_by_consensus([a, b, likely], 2, ALIKE)[0].words == first


def test_neighbours_decide_among_what_is_as_likely_and_as_agreed_with() -> None:
    a, b = candidate([2, 3], 0.0), candidate([2, 4], 0.0)
    assert order_by_consensus([a, b], 1, ALIKE) == [a, b]
    said = Neighbors([[2, 3], [7, 4]], np.array([0.4, 0.6]))
    # a agrees with the first in words and pairs, two of the four lengths: 0.4 * 2 / 4 = 0.2.
    # b agrees with each in half its words and no pair: (0.4 + 0.6) * 1 / 2 / 4 = 0.125.
    assert order_by_consensus([b, a], 1, ALIKE, said) == [a, b]
    assert order_by_consensus([a, b], 1, ALIKE, Neighbors([[7, 4]], np.array([1.0]))) == [b, a]


def test_neighbours_that_share_no_word_leave_the_order() -> None:
    some = [candidate([2, 3], -1.0), candidate([2, 4], -2.0)]
    assert order_by_consensus(some, 1, ALIKE, Neighbors([[8], []], np.array([0.5, 0.5]))) == some


@pytest.mark.parametrize("sentences", [[[]], [[], [2]], [[2], [3]], [[], [2, 3, 4, 5, 6]]])
def test_sentences_of_hardly_a_word_are_ordered_too(sentences: list[list[int]]) -> None:
    given_ = [candidate(sentence, -1.0) for sentence in sentences]
    assert sorted(one.words for one in order_by_consensus(given_, 2, ALIKE)) == sorted(sentences)


@settings(max_examples=15, deadline=None)
@given(configs, seeds, st.sampled_from([1, 3]))
def test_the_beam_is_reordered_and_nothing_else(config: CaptionerConfig, seed: int, groups: int) -> None:
    model, images = build(config, seed), features(4, seed)

    def decode(n_best: int, consensus: float) -> list[list[Candidate]]:
        decoding = DecodingConfig(
            beam_width=6, beam_groups=groups, n_best=n_best, consensus=consensus, length_penalty=0, max_tokens=6
        )
        return Decoder(model, decoding).decode(images)

    likeliest = decode(6, consensus=0)
    reordered = decode(6, consensus=2.0)
    for some, others in zip(likeliest, reordered, strict=True):
        assert sorted(tuple(one.words) for one in some) == sorted(tuple(one.words) for one in others)
        assert [one.words for one in others] == [one.words for one in order_by_consensus(some, 2.0, ALIKE)]
    assert [[one.words for one in some[:1]] for some in reordered] == [
        [one.words for one in some] for some in decode(1, consensus=2.0)
    ]
    # So cold that the likeliest alone counts.
    assert [some[0].words for some in decode(1, consensus=1e-4)] == [some[0].words for some in likeliest]


@settings(max_examples=15, deadline=None)
@given(configs, seeds)
def test_consensus_is_among_the_best_of_the_beam(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(4, seed)

    def decode(candidates: int | None, n_best: int, consensus: float) -> list[list[Candidate]]:
        decoding = DecodingConfig(beam_width=8, candidates=candidates, n_best=n_best, consensus=consensus, max_tokens=6)
        return Decoder(model, decoding).decode(images)

    for some, best in zip(decode(4, 4, 2.0), decode(None, 4, 0), strict=True):
        assert [one.words for one in some] == [one.words for one in order_by_consensus(best, 2.0, ALIKE)]


def test_consensus_needs_several_candidates() -> None:
    with pytest.raises(ConfigError, match="among the candidates of a beam, got beam_width 1"):
        DecodingConfig(beam_width=1, consensus=2.0)
    with pytest.raises(ConfigError, match="consensus is for strategy beam, got strategy sample"):
        DecodingConfig("sample", n_best=5, consensus=2.0)
    with pytest.raises(ConfigError, match="consensus must not be negative, got -1"):
        DecodingConfig(consensus=-1.0)
    with pytest.raises(ConfigError, match="candidates 3 has a say where there is a consensus, got consensus 0"):
        DecodingConfig(candidates=3)
    with pytest.raises(ConfigError, match="expected candidates from n_best 2 to beam_width 5, got 1"):
        DecodingConfig(n_best=2, consensus=3.0, candidates=1)
    with pytest.raises(ConfigError, match="expected candidates from n_best 1 to beam_width 5, got 6"):
        DecodingConfig(consensus=3.0, candidates=6)
    with pytest.raises(ConfigError, match="neighbors 5 has a say where there is a consensus, got consensus 0"):
        DecodingConfig(neighbors=5)
