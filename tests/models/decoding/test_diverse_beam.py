import pytest
import torch
from hypothesis import given, settings, strategies as st

from captionlib.data.text.vocabulary import END, UNKNOWN
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.incremental import IncrementalCaptioner
from tests.models.tiny_captioners import CONFIGS, build, configs, features, seeds

MAX_TOKENS = 5
Hypothesis = tuple[float, tuple[int, ...]]


def search_one_image(
    model: CaptionerNetwork, image: torch.Tensor, groups: int, width: int, diversity: float
) -> set[Hypothesis]:
    """Runs algorithm 1 of the diverse beam search paper, one hypothesis at a time."""
    incremental = IncrementalCaptioner(model)

    def next_words(words: tuple[int, ...]) -> list[float]:
        state = incremental.initial_state(incremental.encode_images(image[None]))
        for word in (END, *words):
            log_probs, state = incremental.step(state, torch.tensor([word]))
        scores: list[float] = log_probs[0].tolist()
        return scores

    beams: list[list[Hypothesis]] = [[(0.0, ())] for _ in range(groups)]
    free = [width] * groups
    finished: set[Hypothesis] = set()
    for step in range(1, MAX_TOKENS + 1):
        earlier_words: list[int] = []
        for group in range(groups):
            options = [
                (total + log_prob - diversity * earlier_words.count(word), total + log_prob, (*words, word))
                for total, words in beams[group]
                for word, log_prob in enumerate(next_words(words))
                if word != UNKNOWN
            ]
            best = sorted(options, reverse=True)[: free[group]]
            earlier_words += [words[-1] for _, _, words in best]
            ending = [(total, words) for _, total, words in best if words[-1] == END or step == MAX_TOKENS]
            finished.update(ending)
            free[group] -= len(ending)
            beams[group] = [(total, words) for _, total, words in best if words[-1] != END and step < MAX_TOKENS]
    return finished


@settings(max_examples=15, deadline=None)
@given(configs, seeds, st.sampled_from([(2, 1), (3, 2), (2, 3)]), st.sampled_from([0.0, 0.5, 3.0]))
def test_diverse_beam_equals_reference_algorithm(
    config: CaptionerConfig, seed: int, shape: tuple[int, int], diversity: float
) -> None:
    groups, width = shape
    model, images = build(config, seed), features(3, seed)
    beam_width = groups * width
    decoding = DecodingConfig(
        beam_width=beam_width, n_best=beam_width, max_tokens=MAX_TOKENS, beam_groups=groups, diversity_penalty=diversity
    )
    for image, candidates in zip(images, Decoder(model, decoding).decode(images), strict=True):
        expected = {
            tuple(word for word in words if word != END): total
            for total, words in search_one_image(model, image, groups, width, diversity)
        }
        found = {tuple(candidate.token_ids): candidate.log_prob for candidate in candidates}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(configs, seeds)
def test_zero_penalty_gives_identical_groups(config: CaptionerConfig, seed: int) -> None:
    model, images = build(config, seed), features(4, seed)
    narrow = Decoder(model, DecodingConfig(beam_width=2, n_best=2)).decode(images)
    groups = Decoder(model, DecodingConfig(beam_width=6, n_best=6, beam_groups=3, diversity_penalty=0.0)).decode(images)
    assert [[c.token_ids for c in image] for image in groups] == [[c.token_ids for c in image] for image in narrow]


def test_large_penalty_gives_different_first_words() -> None:
    decoding = DecodingConfig(beam_width=4, n_best=4, beam_groups=4, diversity_penalty=1000.0)
    for image in Decoder(build(CONFIGS[0], seed=2), decoding).decode(features(5, 2)):
        assert len({candidate.token_ids[0] if candidate.token_ids else END for candidate in image}) == 4
