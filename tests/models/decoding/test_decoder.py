import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from captionlib.data.text.vocabulary import END, UNKNOWN
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.incremental import Candidate, IncrementalCaptioner
from tests.models.tiny_captioners import CONFIGS, FEATURE_SIZE, build, configs, features, seeds, teacher_forced

# The tests that compare log-probabilities compute in float64, because some of these random networks amplify rounding
# errors of float32 a thousandfold.


@settings(max_examples=12, deadline=None)
@given(configs, seeds)
def test_beam_of_width_one_is_greedy(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(4, seed)
    decoded = Decoder(model, DecodingConfig(beam_width=1, max_tokens=6)).decode(images)
    incremental = IncrementalCaptioner(model)
    for image, candidates in zip(images, decoded, strict=True):
        state, words = incremental.initial_state(incremental.encode_images(image[None])), [END]
        while len(words) == 1 or (words[-1] != END and len(words) <= 6):
            log_probs, state = incremental.step(state, torch.tensor(words[-1:]))
            words.append(max(set(range(9)) - {UNKNOWN}, key=log_probs[0].tolist().__getitem__))
        assert [candidate.token_ids for candidate in candidates] == [[word for word in words if word != END]]
        assert candidates[0].token_count == len(words) - 1


@settings(max_examples=8, deadline=None)
@given(configs, seeds, st.sampled_from([0.0, 0.7, 1.0]))
def test_exhaustive_beam_equals_enumeration(config: CaptionerConfig, seed: int, exponent: float) -> None:
    model, images = build(config, seed, vocabulary_size=4).double(), features(2, seed).double()
    words = [2, 3]  # all but END and UNKNOWN
    sentences = [list(sentence) for length in range(4) for sentence in itertools.product(words, repeat=length)]
    all_candidates = [Candidate(sentence, 0.0, token_count=min(len(sentence) + 1, 3)) for sentence in sentences]
    decoding = DecodingConfig(beam_width=15, n_best=15, max_tokens=3, length_penalty=exponent)
    decoder = Decoder(model, decoding, torch.float64)
    for image, candidates in zip(images, decoder.decode(images), strict=True):
        log_probs = teacher_forced(model, image, all_candidates)
        scores = [
            log_prob / sentence.token_count**exponent
            for log_prob, sentence in zip(log_probs, all_candidates, strict=True)
        ]
        order = sorted(range(15), key=lambda number: scores[number], reverse=True)
        assert [candidate.token_ids for candidate in candidates] == [
            all_candidates[number].token_ids for number in order
        ]
        expected = [log_probs[number] for number in order]
        assert [candidate.log_prob for candidate in candidates] == pytest.approx(expected, rel=1e-5, abs=1e-4)


STRATEGIES = [
    {"beam_width": 1},
    {"beam_width": 4, "n_best": 1},
    {"beam_width": 5, "n_best": 5, "no_repeat_ngram_size": 1},
    {"beam_width": 4, "n_best": 4, "no_repeat_ngram_size": 2, "min_words": 2},
    {"beam_width": 6, "n_best": 6, "beam_groups": 3},
    {"beam_width": 4, "n_best": 2, "beam_groups": 4, "diversity_penalty": 2.0, "min_words": 3},
    {"strategy": "sample"},
    {"strategy": "sample", "n_best": 5, "temperature": 1.7, "no_repeat_ngram_size": 2},
    {"strategy": "sample", "n_best": 3, "top_k": 3, "top_p": 0.8, "min_words": 2},
]
strategies = st.sampled_from(STRATEGIES)


@settings(max_examples=40, deadline=None)
@given(configs, seeds, strategies, st.integers(3, 8))
def test_candidates_are_complete_distinct_and_scored_by_model(
    config: CaptionerConfig, seed: int, strategy: dict[str, Any], max_tokens: int
) -> None:
    model, images = build(config, seed).double(), features(6, seed).double()
    decoding = DecodingConfig(**strategy, max_tokens=max_tokens)
    for image, candidates in zip(images, Decoder(model, decoding, torch.float64).decode(images), strict=True):
        assert 1 <= len(candidates) <= decoding.n_best
        assert len({tuple(candidate.token_ids) for candidate in candidates}) == len(candidates)
        scores = [candidate.log_prob / candidate.token_count**0.7 for candidate in candidates]
        assert scores == sorted(scores, reverse=True)
        expected = teacher_forced(model, image, candidates)
        assert [candidate.log_prob for candidate in candidates] == pytest.approx(expected, rel=1e-5, abs=1e-4)
        for candidate in candidates:
            assert not {END, UNKNOWN} & set(candidate.token_ids)
            cut_off = len(candidate.token_ids) == max_tokens
            assert candidate.token_count == len(candidate.token_ids) + (not cut_off) <= max_tokens


@settings(max_examples=40, deadline=None)
@given(configs, seeds, strategies)
def test_candidates_are_independent_of_batch(config: CaptionerConfig, seed: int, strategy: dict[str, Any]) -> None:
    images = features(7, seed).double()
    decoder = Decoder(build(config, seed).double(), DecodingConfig(**strategy, max_tokens=7), torch.float64)
    together = decoder.decode(images)
    alone = [decoder.decode(image[None])[0] for image in images]
    assert [[c.token_ids for c in candidates] for candidates in together] == [
        [c.token_ids for c in image] for image in alone
    ]
    for candidates, others in zip(together, alone, strict=True):
        assert [c.log_prob for c in candidates] == pytest.approx([c.log_prob for c in others], rel=1e-5, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(configs, seeds, strategies, st.lists(st.integers(2, 8), min_size=1, max_size=3))
def test_candidates_begin_with_prefix(
    config: CaptionerConfig, seed: int, strategy: dict[str, Any], prefix: list[int]
) -> None:
    model, images = build(config, seed).double(), features(3, seed).double()
    decoding = DecodingConfig(**strategy, max_tokens=6)
    decoder = Decoder(model, decoding, torch.float64)
    for image, candidates in zip(images, decoder.decode(images, prefix=prefix), strict=True):
        assert all(candidate.token_ids[: len(prefix)] == prefix for candidate in candidates)
        expected = teacher_forced(model, image, candidates)
        assert [candidate.log_prob for candidate in candidates] == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_decode_rejects_prefix_of_max_tokens() -> None:
    decoder = Decoder(build(CONFIGS[0], seed=0), DecodingConfig(max_tokens=3))
    with pytest.raises(ConfigError, match="a prefix of fewer tokens than max_tokens 3, got 3"):
        decoder.decode(features(1, 0), prefix=[2, 2, 2])


@settings(max_examples=12, deadline=None)
@given(configs, seeds)
def test_larger_n_best_extends_list(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(5, seed)
    all_five = Decoder(model, DecodingConfig(n_best=5)).decode(images)
    for n_best in (1, 3):
        fewer = Decoder(model, DecodingConfig(n_best=n_best)).decode(images)
        assert [[c.token_ids for c in image[:n_best]] for image in all_five] == [
            [c.token_ids for c in image] for image in fewer
        ]


def test_endless_sentence_is_cut_off() -> None:
    model = build(CONFIGS[0], seed=0)
    with torch.no_grad():
        model.output.bias[END] = -100
    candidates = Decoder(model, DecodingConfig(max_tokens=4)).decode(features(3, 0))
    assert [len(image[0].token_ids) for image in candidates] == [4, 4, 4]
    assert [image[0].token_count for image in candidates] == [4, 4, 4]


def test_empty_sentence_is_a_candidate() -> None:
    model = build(CONFIGS[0], seed=0)
    with torch.no_grad():
        model.output.bias[END] = 100
    ((candidate,),) = Decoder(model).decode(features(1, 0))
    assert (candidate.token_ids, candidate.token_count) == ([], 1)
    assert candidate.log_prob == pytest.approx(0)


def test_length_penalty_favors_longer_sentences() -> None:
    model = build(CaptionerConfig("rnn", hidden_size=1, embedding_size=1), seed=0, vocabulary_size=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.output.bias.copy_(torch.tensor([0.6, 1e-9, 0.4]).log())
    image = torch.zeros(1, FEATURE_SIZE)
    for exponent, words in (
        (0.0, 0),
        (2.0, 3),
    ):  # ln 0.6 is the highest log-probability, (3 ln 0.4 + ln 0.6) / 4^2 scores best
        decoding = DecodingConfig(beam_width=8, max_tokens=4, length_penalty=exponent)
        ((candidate,),) = Decoder(model, decoding).decode(image)
        assert len(candidate.token_ids) == words
        assert candidate.log_prob == pytest.approx(words * math.log(0.4) + math.log(0.6))


def test_beam_wider_than_vocabulary_returns_all_sentences() -> None:
    model = build(CONFIGS[2], seed=1, vocabulary_size=3)
    (candidates,) = Decoder(model, DecodingConfig(beam_width=50, n_best=50, max_tokens=3)).decode(features(1, 1))
    assert sorted(candidate.token_ids for candidate in candidates) == [[], [2], [2, 2], [2, 2, 2]]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_bfloat16_log_probs_are_close_to_float32(config: CaptionerConfig) -> None:
    model, images = build(config, seed=3), features(10, 3)
    for image, (candidate,) in zip(images, Decoder(model, dtype=torch.bfloat16).decode(images), strict=True):
        (expected,) = teacher_forced(model, image, [candidate])
        assert candidate.log_prob == pytest.approx(expected, abs=0.02 * candidate.token_count)


def test_decode_accepts_arrays_and_empty_batches() -> None:
    decoder = Decoder(build(CONFIGS[0], seed=0))
    images = features(2, 0)
    assert decoder.decode(images.numpy()) == decoder.decode(images)
    assert decoder.decode(np.zeros((0, FEATURE_SIZE), np.float32)) == []


def test_decode_rejects_infinite_features() -> None:
    images = features(3, 0)
    images[1, 0] = torch.inf
    with pytest.raises(DatasetError, match="got infinity or NaN in row 1 of the batch"):
        Decoder(build(CONFIGS[0], seed=0)).decode(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, "beam_width: Input should be greater than 0, got 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than 0, got 0"),
        ({"beam_width": 3, "n_best": 4}, "at most beam_width 3, got 4"),
        ({"length_penalty": -1.0}, "length_penalty: .* greater than or equal to 0, got -1.0"),
        ({"min_words": 21, "max_tokens": 20}, "min_words must be at most max_tokens 20, got 21"),
        ({"beam_width": 5, "beam_groups": 2}, "beam_width must be a multiple of beam_groups 2, got 5"),
        ({"temperature": 0.5}, "temperature is for strategy sample, got strategy beam"),
        ({"strategy": "sample", "beam_groups": 5}, "beam_groups is for strategy beam, got strategy sample"),
        ({"strategy": "sample", "temperature": 0.0}, "temperature: Input should be greater than 0, got 0.0"),
        ({"strategy": "sample", "top_k": 0}, "top_k: Input should be greater than 0, got 0"),
        ({"strategy": "sample", "top_p": 0.0}, "top_p: Input should be greater than 0, got 0.0"),
    ],
)
def test_decoding_config_rejects_impossible_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodingConfig(**options)
