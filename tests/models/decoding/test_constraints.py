import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from captionlib.data.text.vocabulary import END, Vocabulary
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.incremental import Candidate
from tests.models.tiny_captioners import CONFIGS, build, configs, features, seeds, teacher_forced

VOCABULARY = Vocabulary(("a", "dog", "runs", "it", "'s", "far", "away"), (1,) * 7, unknown_count=1, sentence_count=1)
STRATEGIES: list[dict[str, Any]] = [
    {"beam_width": 5, "n_best": 5},
    {"beam_width": 6, "n_best": 6, "beam_groups": 2},
    {"strategy": "sample", "n_best": 5, "temperature": 3.0},
]


def has_repeated_ngram(words: list[int], n: int) -> bool:
    ngrams = list(zip(*(words[shift:] for shift in range(n)), strict=False))
    return len(set(ngrams)) < len(ngrams)


@settings(max_examples=20, deadline=None)
@given(configs, seeds, st.sampled_from(STRATEGIES), st.integers(1, 3))
def test_ngrams_are_not_repeated(config: CaptionerConfig, seed: int, strategy: dict[str, Any], n: int) -> None:
    model, images = build(config, seed), features(4, seed)
    with torch.no_grad():
        model.output.bias[END] -= 3  # longer sentences, with repetitions
    decoded = Decoder(model, DecodingConfig(**strategy, no_repeat_ngram_size=n)).decode(images)
    assert not any(has_repeated_ngram(candidate.token_ids, n) for image in decoded for candidate in image)


@settings(max_examples=20, deadline=None)
@given(configs, seeds, st.sampled_from(STRATEGIES), st.integers(1, 6))
def test_sentences_have_min_words(config: CaptionerConfig, seed: int, strategy: dict[str, Any], min_words: int) -> None:
    decoding = DecodingConfig(**strategy, min_words=min_words, max_tokens=6)
    for image in Decoder(build(config, seed), decoding).decode(features(4, seed)):
        assert all(len(candidate.token_ids) >= min_words for candidate in image)


@settings(max_examples=20, deadline=None)
@given(configs, seeds, st.sampled_from(STRATEGIES))
def test_forbidden_words_are_never_written(config: CaptionerConfig, seed: int, strategy: dict[str, Any]) -> None:
    model, images = build(config, seed), features(4, seed)
    decoding = DecodingConfig(**strategy, forbidden_words=("Dog", "runs", "'s", "unheard-of"))
    written = {
        word
        for image in Decoder(model, decoding, vocabulary=VOCABULARY).decode(images)
        for candidate in image
        for word in candidate.token_ids
    }
    assert not written & set(VOCABULARY.encode_tokens(["dog", "runs", "'s"]))


@settings(max_examples=8, deadline=None)
@given(configs, seeds)
def test_exhaustive_beam_finds_best_allowed_sentences(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed, vocabulary_size=5), features(2, seed)
    words = [2, 4]  # 3 is forbidden
    vocabulary = Vocabulary(("a", "dog", "runs"), (1, 1, 1), unknown_count=1, sentence_count=1)
    decoding = DecodingConfig(
        beam_width=31, n_best=31, max_tokens=4, min_words=2, no_repeat_ngram_size=2, forbidden_words=("dog",)
    )
    allowed = [
        Candidate(list(sentence), 0.0, token_count=min(length + 1, 4))
        for length in (2, 3, 4)
        for sentence in itertools.product(words, repeat=length)
        if not has_repeated_ngram(list(sentence), 2)
    ]
    for image, candidates in zip(images, Decoder(model, decoding, vocabulary=vocabulary).decode(images), strict=True):
        log_probs = teacher_forced(model, image, allowed)
        scores = [log_prob / one.token_count**0.7 for log_prob, one in zip(log_probs, allowed, strict=True)]
        order = sorted(range(len(allowed)), key=scores.__getitem__, reverse=True)
        assert [candidate.token_ids for candidate in candidates] == [allowed[number].token_ids for number in order]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_sentence_without_allowed_word_ends(strategy: dict[str, Any]) -> None:
    model = build(CONFIGS[0], seed=0, vocabulary_size=4)
    decoding = DecodingConfig(**strategy, min_words=5, no_repeat_ngram_size=1)
    for image in Decoder(model, decoding).decode(features(3, 0)):
        assert {tuple(candidate.token_ids) for candidate in image} <= {(2, 3), (3, 2)}
        assert all(candidate.token_count == 3 for candidate in image)


def test_invalid_forbidden_words_are_rejected() -> None:
    model = build(CONFIGS[0], seed=0)
    with pytest.raises(ConfigError, match="need the model's vocabulary"):
        Decoder(model, DecodingConfig(forbidden_words=("dog",)))
    with pytest.raises(ConfigError, match="single words, got 'the dog', which is 2 words: the dog"):
        Decoder(model, DecodingConfig(forbidden_words=("the dog",)), vocabulary=VOCABULARY)
