import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captionlib.errors import ConfigError
from captionlib.models.captioner import CaptionerConfig
from captionlib.models.consensus import order_by_consensus
from captionlib.models.decoding import Candidate, Decoder, DecodingConfig
from tests.models.tiny_captioners import build, configs, features, seeds


def candidate(words: list[int], log_prob: float) -> Candidate:
    return Candidate(words, log_prob, len(words) + 1)


def test_what_others_resemble_comes_before_what_is_likelier() -> None:
    odd = candidate([10, 9, 8, 7], math.log(0.3))
    alike = [candidate([2, 3, 4, 5], math.log(0.25)), candidate([2, 3, 4, 6], math.log(0.2))]
    assert order_by_consensus([odd, *alike], temperature=1) == [*alike, odd]


def test_agreement_is_smoothed_bleu_weighed_by_probability() -> None:
    # a, b: 2 of 3 words, (1 + 1) / (2 + 1) pairs, (0 + 1) / (1 + 1) triples, nothing of 4: 1; as long as each other.
    of_a_with_b = (2 / 3 * 2 / 3 * 1 / 2) ** (1 / 4)
    # c repeats one word of both: clipped to 1 of 2, (0 + 1) / (1 + 1) pairs; a word too short.
    of_c_with_a = (1 / 2 * 1 / 2) ** (1 / 4) * math.exp(1 - 3 / 2)
    a, b, c = candidate([2, 3, 4], 0.0), candidate([2, 3, 5], 0.0), candidate([2, 2], 0.0)
    # As likely as each other a and b tie: 1 + of_a_with_b + what they are worth with c alone for a reference.
    assert order_by_consensus([b, a, c], temperature=1) == [b, a, c]
    # c comes first once it is so much likelier that its 1 with itself outweighs what a has of b and itself.
    of_a_with_c = (1 / 3 * 1 / 3 * 1 / 2) ** (1 / 4)
    even = math.log((1 + of_a_with_b - 2 * of_c_with_a) / (1 - of_a_with_c))
    for more, first in ((-0.01, [2, 3, 4]), (0.01, [2, 2])):
        likely = candidate([2, 2], 2 * (even + more))
        assert order_by_consensus([a, b, likely], temperature=2)[0].words == first


@pytest.mark.parametrize("sentences", [[[]], [[], [2]], [[2], [3]], [[], [2, 3, 4, 5, 6]]])
def test_sentences_of_hardly_a_word_are_ordered_too(sentences: list[list[int]]) -> None:
    given_ = [candidate(sentence, -1.0) for sentence in sentences]
    assert sorted(one.words for one in order_by_consensus(given_, temperature=2)) == sorted(sentences)


@settings(max_examples=15, deadline=None)
@given(configs, seeds, st.sampled_from([1, 3]))
def test_the_beam_is_reordered_and_nothing_else(config: CaptionerConfig, seed: int, groups: int) -> None:
    model, images = build(config, seed), features(4, seed)

    def decode(n_best: int, consensus: float) -> list[list[Candidate]]:
        decoding = DecodingConfig(
            beam_width=6, beam_groups=groups, n_best=n_best, consensus=consensus, length_normalisation=0, max_tokens=6
        )
        return Decoder(model, decoding).decode(images)

    likeliest = decode(6, consensus=0)
    reordered = decode(6, consensus=2.0)
    for some, others in zip(likeliest, reordered, strict=True):
        assert sorted(tuple(one.words) for one in some) == sorted(tuple(one.words) for one in others)
        assert [one.words for one in others] == [one.words for one in order_by_consensus(some, 2.0)]
    assert [[one.words for one in some[:1]] for some in reordered] == [
        [one.words for one in some] for some in decode(1, consensus=2.0)
    ]
    # So cold that the likeliest alone counts.
    assert [some[0].words for some in decode(1, consensus=1e-4)] == [some[0].words for some in likeliest]


def test_consensus_needs_several_candidates() -> None:
    with pytest.raises(ConfigError, match="among the candidates of a beam, got beam_width 1"):
        DecodingConfig(beam_width=1, consensus=2.0)
    with pytest.raises(ConfigError, match="consensus is for strategy beam, got strategy sample"):
        DecodingConfig("sample", n_best=5, consensus=2.0)
    with pytest.raises(ConfigError, match="consensus must not be negative, got -1"):
        DecodingConfig(consensus=-1.0)
