import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.datastore import Neighbors
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.incremental import Candidate
from captionlib.models.decoding.rerank import RerankConfig, rerank_candidates
from tests.models.tiny_captioners import build, configs, features, seeds


def candidate(words: list[int], log_prob: float) -> Candidate:
    return Candidate(words, log_prob, len(words) + 1)


UNWEIGHTED = CiderD()  # weights all n-grams equally


def test_agreement_outranks_probability() -> None:
    outlier = candidate([10, 9, 8, 7], math.log(0.3))
    similar = [candidate([2, 3, 4, 5], math.log(0.25)), candidate([2, 3, 4, 6], math.log(0.2))]
    assert rerank_candidates([outlier, *similar], 1, UNWEIGHTED) == [*similar, outlier]


def test_score_is_cider_weighted_by_probability() -> None:
    a, b = candidate([2, 3], 0.0), candidate([2, 4], 0.0)
    # a and b share one of two words. Each sentence equals itself in words and pairs, two of the four lengths.
    similarity_to_b, self_similarity = 1 / 4 * 1 / 2, 2 / 4
    # a comes first until the probability of c outweighs the similarity of a to b and itself.
    tie = math.log((self_similarity + similarity_to_b) / self_similarity)
    for margin, first in ((-0.01, [2, 3]), (0.01, [5, 6])):
        probable = candidate([5, 6], 2 * (tie + margin))
        assert rerank_candidates([a, b, probable], 2, UNWEIGHTED)[0].token_ids == first


def test_neighbors_break_ties() -> None:
    a, b = candidate([2, 3], 0.0), candidate([2, 4], 0.0)
    assert rerank_candidates([a, b], 1, UNWEIGHTED) == [a, b]
    neighbors = Neighbors([[2, 3], [7, 4]], np.array([0.4, 0.6]))
    # a equals the first in words and pairs, two of the four lengths: 0.4 * 2 / 4 = 0.2.
    # b shares half its words and no pair with each: (0.4 + 0.6) * 1 / 2 / 4 = 0.125.
    assert rerank_candidates([b, a], 1, UNWEIGHTED, neighbors) == [a, b]
    assert rerank_candidates([a, b], 1, UNWEIGHTED, Neighbors([[7, 4]], np.array([1.0]))) == [b, a]


def test_neighbors_without_common_words_keep_order() -> None:
    candidates = [candidate([2, 3], -1.0), candidate([2, 4], -2.0)]
    assert rerank_candidates(candidates, 1, UNWEIGHTED, Neighbors([[8], []], np.array([0.5, 0.5]))) == candidates


@pytest.mark.parametrize("sentences", [[[]], [[], [2]], [[2], [3]], [[], [2, 3, 4, 5, 6]]])
def test_short_sentences_are_reranked(sentences: list[list[int]]) -> None:
    candidates = [candidate(sentence, -1.0) for sentence in sentences]
    assert sorted(one.token_ids for one in rerank_candidates(candidates, 2, UNWEIGHTED)) == sorted(sentences)


@settings(max_examples=15, deadline=None)
@given(configs, seeds, st.sampled_from([1, 3]))
def test_reranking_only_reorders_the_beam(config: CaptionerConfig, seed: int, groups: int) -> None:
    model, images = build(config, seed), features(4, seed)

    def decode(n_best: int, rerank: RerankConfig) -> list[list[Candidate]]:
        decoding = DecodingConfig(
            beam_width=6, beam_groups=groups, n_best=n_best, rerank=rerank, length_penalty=0, max_tokens=6
        )
        return Decoder(model, decoding).decode(images)

    by_probability = decode(6, RerankConfig())
    reordered = decode(6, RerankConfig("mbr", temperature=2.0))
    for some, others in zip(by_probability, reordered, strict=True):
        assert sorted(tuple(one.token_ids) for one in some) == sorted(tuple(one.token_ids) for one in others)
        assert [one.token_ids for one in others] == [one.token_ids for one in rerank_candidates(some, 2.0, UNWEIGHTED)]
    assert [[one.token_ids for one in some[:1]] for some in reordered] == [
        [one.token_ids for one in some] for some in decode(1, RerankConfig("mbr", temperature=2.0))
    ]
    # At this temperature, only the most probable candidates count: several if their probabilities are almost equal.
    assert [some[0].log_prob for some in decode(1, RerankConfig("mbr", temperature=1e-4))] == pytest.approx(
        [some[0].log_prob for some in by_probability], abs=2e-3
    )


@settings(max_examples=15, deadline=None)
@given(configs, seeds)
def test_pool_size_limits_reranking_to_best_of_beam(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(4, seed)

    def decode(rerank: RerankConfig) -> list[list[Candidate]]:
        decoding = DecodingConfig(beam_width=8, n_best=4, rerank=rerank, max_tokens=6)
        return Decoder(model, decoding).decode(images)

    reranked = decode(RerankConfig("mbr", temperature=2.0, pool_size=4))
    for some, best in zip(reranked, decode(RerankConfig()), strict=True):
        assert [one.token_ids for one in some] == [one.token_ids for one in rerank_candidates(best, 2.0, UNWEIGHTED)]


def test_decoding_config_rejects_rerank_without_pool() -> None:
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
def test_rerank_config_rejects_invalid_and_unused_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RerankConfig(**options)
