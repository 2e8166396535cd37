import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from captionlib.models.captioners.captioner import Captioner, CaptionerConfig
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from tests.models.tiny_captioners import CONFIGS, FEATURE_SIZE, build, configs, features, seeds

SAMPLE = DecodingConfig(strategy="sample")
DRAWS = 4000


def model_that_says(*probabilities: float) -> Captioner:
    """A model of END, UNKNOWN and words of these probabilities, whatever stands before."""
    model = build(CaptionerConfig("rnn", hidden_size=1, embedding_size=1), seed=0, vocabulary_size=len(probabilities))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.output.bias.copy_(torch.tensor(probabilities).log())
    return model


def shares(model: Captioner, config: DecodingConfig) -> dict[int, float]:
    """How often each first word is drawn, for images that differ in their key alone."""
    keys = [str(number) for number in range(DRAWS)]
    drawn = Decoder(model, replace(config, max_tokens=1, min_words=1)).decode(torch.zeros(DRAWS, FEATURE_SIZE), keys)
    counts = Counter(candidates[0].token_ids[0] for candidates in drawn)
    return {word: count / DRAWS for word, count in sorted(counts.items())}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # END, which min_words rules out, has 0.1, UNKNOWN 0.1; four words share the rest.
        (SAMPLE, {2: 0.4 / 0.8, 3: 0.2 / 0.8, 4: 0.15 / 0.8, 5: 0.05 / 0.8}),
        (replace(SAMPLE, temperature=0.5), {2: 16 / 22.5, 3: 4 / 22.5, 4: 2.25 / 22.5, 5: 0.25 / 22.5}),
        (replace(SAMPLE, top_k=2), {2: 2 / 3, 3: 1 / 3}),
        (replace(SAMPLE, top_p=0.7), {2: 2 / 3, 3: 1 / 3}),
        (replace(SAMPLE, top_p=0.8), {2: 0.4 / 0.75, 3: 0.2 / 0.75, 4: 0.15 / 0.75}),
        (replace(SAMPLE, top_k=3, top_p=0.5), {2: 1.0}),
        (replace(SAMPLE, top_p=0.01), {2: 1.0}),
        (replace(SAMPLE, top_k=50), {2: 0.4 / 0.8, 3: 0.2 / 0.8, 4: 0.15 / 0.8, 5: 0.05 / 0.8}),
    ],
    ids=str,
)
def test_words_are_drawn_as_often_as_they_are_likely(config: DecodingConfig, expected: dict[int, float]) -> None:
    # Five deviations of a share of 4000 draws are 0.04.
    assert shares(model_that_says(0.1, 0.1, 0.4, 0.2, 0.15, 0.05), config) == pytest.approx(expected, abs=0.04)


def test_log_prob_is_the_models_own_whatever_the_temperature() -> None:
    config = replace(SAMPLE, temperature=0.01, max_tokens=2)
    ((candidate,),) = Decoder(model_that_says(0.1, 0.1, 0.5, 0.3), config).decode(torch.zeros(1, FEATURE_SIZE))
    assert candidate.token_ids == [2, 2]
    assert candidate.log_prob == pytest.approx(2 * math.log(0.5))


@settings(max_examples=10, deadline=None)
@given(configs, seeds)
def test_drawing_among_one_word_is_greedy(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(4, seed)
    greedy = Decoder(model, DecodingConfig(beam_width=1)).decode(images)
    drawn = Decoder(model, replace(SAMPLE, top_k=1)).decode(images)
    assert [[c.token_ids for c in image] for image in drawn] == [[c.token_ids for c in image] for image in greedy]


def test_the_seed_decides() -> None:
    model, images = build(CONFIGS[0], seed=1), features(8, 1)
    first = Decoder(model, SAMPLE).decode(images)
    assert Decoder(model, SAMPLE).decode(images) == first
    assert Decoder(model, replace(SAMPLE, seed=1)).decode(images) != first


def test_what_is_drawn_goes_with_the_key_and_not_with_the_place() -> None:
    images = features(1, 1).expand(6, -1, -1)
    decoder = Decoder(build(CONFIGS[0], seed=1), replace(SAMPLE, temperature=2.0))
    drawn = [image[0].token_ids for image in decoder.decode(images, keys=["a", "b", "c", "d", "e", "f"])]
    again = [image[0].token_ids for image in decoder.decode(images, keys=["f", "b", "d", "c", "a", "e"])]
    assert again == [drawn[number] for number in (5, 1, 3, 2, 0, 4)]
    assert len(set(map(tuple, drawn))) > 1
    without = [image[0].token_ids for image in decoder.decode(images)]
    assert without == [without[0]] * 6  # equal features, equal sentences


def test_drawing_more_sentences_keeps_the_first_ones() -> None:
    model, images = build(CONFIGS[0], seed=1), features(5, 1)
    one = Decoder(model, SAMPLE).decode(images)
    many = Decoder(model, replace(SAMPLE, n_best=6)).decode(images)
    assert all(len(candidates) > 1 for candidates in many)
    for (single,), candidates in zip(one, many, strict=True):
        assert single.token_ids in [candidate.token_ids for candidate in candidates]


def test_equal_sentences_are_told_once() -> None:
    config = replace(SAMPLE, n_best=50, max_tokens=1)
    (candidates,) = Decoder(model_that_says(0.4, 0.1, 0.5), config).decode(torch.zeros(1, FEATURE_SIZE))
    assert [candidate.token_ids for candidate in candidates] == [[2], []]
