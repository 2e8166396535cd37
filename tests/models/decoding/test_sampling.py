import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.sampling import sample_tokens
from tests.models.tiny_captioners import CONFIGS, FEATURE_SIZE, build, configs, features, seeds

SAMPLE = DecodingConfig(strategy="sample")
SAMPLES = 4000


def build_unigram_model(*probabilities: float) -> CaptionerNetwork:
    """Builds a model with these probabilities of END, UNKNOWN and words, whatever the image and the previous words."""
    model = build(CaptionerConfig("rnn", hidden_size=1, embedding_size=1), seed=0, vocabulary_size=len(probabilities))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.output.bias.copy_(torch.tensor(probabilities).log())
    return model


def measure_frequencies(model: CaptionerNetwork, config: DecodingConfig) -> dict[int, float]:
    """Returns the frequency of each first word over images that differ only in their key."""
    image_ids = [str(number) for number in range(SAMPLES)]
    samples = Decoder(model, replace(config, max_tokens=1, min_words=1)).decode(
        torch.zeros(SAMPLES, FEATURE_SIZE), image_ids
    )
    counts = Counter(candidates[0].token_ids[0] for candidates in samples)
    return {word: count / SAMPLES for word, count in sorted(counts.items())}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # END (0.1) is excluded by min_words, UNKNOWN (0.1) always; four words share the rest.
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
def test_words_are_sampled_by_probability(config: DecodingConfig, expected: dict[int, float]) -> None:
    # Five standard deviations of a frequency over 4000 samples are 0.04.
    assert measure_frequencies(build_unigram_model(0.1, 0.1, 0.4, 0.2, 0.15, 0.05), config) == pytest.approx(
        expected, abs=0.04
    )


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_nucleus_is_sampled_in_proportion_to_its_probabilities(top_p: float) -> None:
    generator, samples = torch.Generator().manual_seed(0), 20_000
    probabilities = (2 * torch.randn(300, generator=generator)).softmax(0)
    uniforms = torch.rand(samples, generator=generator)
    words = sample_tokens(probabilities.log().expand(samples, -1), uniforms, replace(SAMPLE, top_p=top_p))
    descending, order = probabilities.sort(descending=True)
    nucleus = descending.where(descending.cumsum(0) - descending < top_p, 0)
    expected = samples * nucleus / nucleus.sum()
    counts = words.bincount(minlength=300)[order]
    assert counts[nucleus == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * max(degrees, 1))


def test_log_prob_ignores_temperature() -> None:
    config = replace(SAMPLE, temperature=0.01, max_tokens=2)
    ((candidate,),) = Decoder(build_unigram_model(0.1, 0.1, 0.5, 0.3), config).decode(torch.zeros(1, FEATURE_SIZE))
    assert candidate.token_ids == [2, 2]
    assert candidate.log_prob == pytest.approx(2 * math.log(0.5))


@settings(max_examples=10, deadline=None)
@given(configs, seeds)
def test_top_k_of_one_is_greedy(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(4, seed)
    greedy = Decoder(model, DecodingConfig(beam_width=1)).decode(images)
    samples = Decoder(model, replace(SAMPLE, top_k=1)).decode(images)
    assert [[c.token_ids for c in image] for image in samples] == [[c.token_ids for c in image] for image in greedy]


def test_seed_determines_samples() -> None:
    model, images = build(CONFIGS[0], seed=1), features(8, 1)
    first = Decoder(model, SAMPLE).decode(images)
    assert Decoder(model, SAMPLE).decode(images) == first
    assert Decoder(model, replace(SAMPLE, seed=1)).decode(images) != first


def test_samples_depend_on_key_and_not_on_position() -> None:
    images = features(1, 1).expand(6, -1, -1)
    decoder = Decoder(build(CONFIGS[0], seed=1), replace(SAMPLE, temperature=2.0))
    samples = [image[0].token_ids for image in decoder.decode(images, image_ids=["a", "b", "c", "d", "e", "f"])]
    permuted = [image[0].token_ids for image in decoder.decode(images, image_ids=["f", "b", "d", "c", "a", "e"])]
    assert permuted == [samples[number] for number in (5, 1, 3, 2, 0, 4)]
    assert len(set(map(tuple, samples))) > 1
    without_ids = [image[0].token_ids for image in decoder.decode(images)]
    assert without_ids == [without_ids[0]] * 6  # equal features give equal sentences


def test_larger_n_best_keeps_first_samples() -> None:
    model, images = build(CONFIGS[0], seed=1), features(5, 1)
    one = Decoder(model, SAMPLE).decode(images)
    many = Decoder(model, replace(SAMPLE, n_best=6)).decode(images)
    assert all(len(candidates) > 1 for candidates in many)
    for (single,), candidates in zip(one, many, strict=True):
        assert single.token_ids in [candidate.token_ids for candidate in candidates]


def test_duplicate_samples_are_dropped() -> None:
    config = replace(SAMPLE, n_best=50, max_tokens=1)
    (candidates,) = Decoder(build_unigram_model(0.4, 0.1, 0.5), config).decode(torch.zeros(1, FEATURE_SIZE))
    assert [candidate.token_ids for candidate in candidates] == [[2], []]
