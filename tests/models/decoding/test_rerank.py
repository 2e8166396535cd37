import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.decoding.candidate import Candidate
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.datastore import Neighbors
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.rerank import RerankConfig, rerank_candidates
from tests.models.tiny_captioners import build, configs, features, seeds


def candidate(words: list[int], log_prob: float) -> Candidate:
    return Candidate(words, log_prob, len(words) + 1)


ALIKE = CiderD()  # all n-grams of the same weight


def test_what_others_resemble_comes_before_what_is_likelier() -> None:
    odd = candidate([10, 9, 8, 7], math.log(0.3))
    alike = [candidate([2, 3, 4, 5], math.log(0.25)), candidate([2, 3, 4, 6], math.log(0.2))]
    assert rerank_candidates([odd, *alike], 1, ALIKE) == [*alike, odd]


def test_agreement_is_cider_weighed_by_probability() -> None:
    a, b = candidate([2, 3], 0.0), candidate([2, 4], 0.0)
    # They share one word of two; c shares nothing, and agrees with itself in words and pairs: 1 of each.
    of_a_with_b, of_itself = 1 / 4 * 1 / 2, 2 / 4
    # a comes first until c is so much likelier that it outweighs what a has of b and itself.
    even = math.log((of_itself + of_a_with_b) / of_itself)
    for more, first in ((-0.01, [2, 3]), (0.01, [5, 6])):
        likely = candidate([5, 6], 2 * (even + more))
        assert rerank_candidates([a, b, likely], 2, ALIKE)[0].token_ids == first


def test_neighbours_decide_among_what_is_as_likely_and_as_agreed_with() -> None:
    a, b = candidate([2, 3], 0.0), candidate([2, 4], 0.0)
    assert rerank_candidates([a, b], 1, ALIKE) == [a, b]
    said = Neighbors([[2, 3], [7, 4]], np.array([0.4, 0.6]))
    # a agrees with the first in words and pairs, two of the four lengths: 0.4 * 2 / 4 = 0.2.
    # b agrees with each in half its words and no pair: (0.4 + 0.6) * 1 / 2 / 4 = 0.125.
    assert rerank_candidates([b, a], 1, ALIKE, said) == [a, b]
    assert rerank_candidates([a, b], 1, ALIKE, Neighbors([[7, 4]], np.array([1.0]))) == [b, a]


def test_neighbours_that_share_no_word_leave_the_order() -> None:
    some = [candidate([2, 3], -1.0), candidate([2, 4], -2.0)]
    assert rerank_candidates(some, 1, ALIKE, Neighbors([[8], []], np.array([0.5, 0.5]))) == some


@pytest.mark.parametrize("sentences", [[[]], [[], [2]], [[2], [3]], [[], [2, 3, 4, 5, 6]]])
def test_sentences_of_hardly_a_word_are_ordered_too(sentences: list[list[int]]) -> None:
    given_ = [candidate(sentence, -1.0) for sentence in sentences]
    assert sorted(one.token_ids for one in rerank_candidates(given_, 2, ALIKE)) == sorted(sentences)


@settings(max_examples=15, deadline=None)
@given(configs, seeds, st.sampled_from([1, 3]))
def test_the_beam_is_reordered_and_nothing_else(config: CaptionerConfig, seed: int, groups: int) -> None:
    model, images = build(config, seed), features(4, seed)

    def decode(n_best: int, rerank: RerankConfig) -> list[list[Candidate]]:
        decoding = DecodingConfig(
            beam_width=6, beam_groups=groups, n_best=n_best, rerank=rerank, length_penalty=0, max_tokens=6
        )
        return Decoder(model, decoding).decode(images)

    likeliest = decode(6, RerankConfig())
    reordered = decode(6, RerankConfig("mbr", temperature=2.0))
    for some, others in zip(likeliest, reordered, strict=True):
        assert sorted(tuple(one.token_ids) for one in some) == sorted(tuple(one.token_ids) for one in others)
        assert [one.token_ids for one in others] == [one.token_ids for one in rerank_candidates(some, 2.0, ALIKE)]
    assert [[one.token_ids for one in some[:1]] for some in reordered] == [
        [one.token_ids for one in some] for some in decode(1, RerankConfig("mbr", temperature=2.0))
    ]
    # So cold that the likeliest alone counts.
    assert [some[0].token_ids for some in decode(1, RerankConfig("mbr", temperature=1e-4))] == [
        some[0].token_ids for some in likeliest
    ]


@settings(max_examples=15, deadline=None)
@given(configs, seeds)
def test_consensus_is_among_the_best_of_the_beam(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(4, seed)

    def decode(rerank: RerankConfig) -> list[list[Candidate]]:
        decoding = DecodingConfig(beam_width=8, n_best=4, rerank=rerank, max_tokens=6)
        return Decoder(model, decoding).decode(images)

    reranked = decode(RerankConfig("mbr", temperature=2.0, pool_size=4))
    for some, best in zip(reranked, decode(RerankConfig()), strict=True):
        assert [one.token_ids for one in some] == [one.token_ids for one in rerank_candidates(best, 2.0, ALIKE)]


def test_consensus_needs_several_candidates() -> None:
    with pytest.raises(ConfigError, match="compares the candidates of a beam, got beam_width 1"):
        DecodingConfig(beam_width=1, rerank=RerankConfig("mbr"))
    with pytest.raises(ConfigError, match="rerank is for strategy beam, got strategy sample"):
        DecodingConfig("sample", n_best=5, rerank=RerankConfig("mbr"))
    with pytest.raises(ConfigError, match=r"expected rerank.pool_size from n_best 2 to beam_width 5, got 1"):
        DecodingConfig(n_best=2, rerank=RerankConfig("mbr", pool_size=1))
    with pytest.raises(ConfigError, match=r"expected rerank.pool_size from n_best 1 to beam_width 5, got 6"):
        DecodingConfig(rerank=RerankConfig("mbr", pool_size=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mbr", "temperature": 0}, "temperature: Input should be greater than 0, got 0"),
        ({"method": "mbr", "mutual_information_weight": -1}, "mutual_information_weight: .* got -1"),
        ({"method": "mbr", "neighbors": -1}, "neighbors: .* got -1"),
        ({"method": "mbr", "pool_size": 0}, "pool_size: .* got 0"),
        ({"temperature": 2.0}, r"temperature 2.0 has no effect with method none"),
        ({"pool_size": 3}, "pool_size 3 has no effect with method none"),
        ({"neighbors": 5}, "neighbors 5 has no effect with method none"),
        ({"mutual_information_weight": 0.1}, r"mutual_information_weight 0.1 has no effect with method none"),
    ],
)
def test_rerank_config_rejects_values_without_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RerankConfig(**options)
