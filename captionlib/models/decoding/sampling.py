"""Samples sentences from a captioner, for many images at once.

The random numbers of a sentence depend only on the seed, its image and its index. They do not depend on the other
images in the batch, their order or the number of sentences.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints
from captionlib.models.decoding.incremental import Candidate, Hypotheses, IncrementalCaptioner

__all__ = ["generate_uniforms", "sample_captions", "sample_tokens"]


def sample_captions(
    captioner: IncrementalCaptioner,
    config: DecodingConfig,
    constraints: Constraints,
    start: Hypotheses,
    seed_keys: Sequence[bytes],
) -> list[list[Candidate]]:
    """Samples `n_best` sentences per image, including duplicates. `start` contains one hypothesis per image.

    The key of an image and the seed determine its random numbers.
    """
    device, per_image = captioner.device, config.n_best
    sentence = torch.arange(len(seed_keys) * per_image, device=device)  # sentence of each row
    log_prob, words, state = start.select(sentence // per_image)
    steps = config.find_max_tokens() - (words.shape[1] - 1)
    uniforms = generate_uniforms(seed_keys, per_image, steps, config.seed).to(device)
    candidates: dict[int, Candidate] = {}
    for step in range(steps):
        if not len(sentence):
            break
        log_probs, state = captioner.step(state, words[:, -1])
        constraints.apply(log_probs, words[:, 1:])
        word = sample_tokens(log_probs, uniforms[sentence, step], config)
        log_prob = log_prob + log_probs.gather(1, word[:, None])[:, 0]
        words = torch.cat([words, word[:, None]], 1)
        finished = (word == END) | (step == steps - 1)
        if finished.any():
            rows = (values[finished].tolist() for values in (sentence, log_prob, words[:, 1:]))
            for index, total, ids in zip(*rows, strict=True):
                candidates[index] = Candidate(ids[:-1] if ids[-1] == END else ids, total, token_count=len(ids))
            kept = (~finished).nonzero()[:, 0]
            sentence, log_prob, words, state = sentence[kept], log_prob[kept], words[kept], state.select(kept)
    return [[candidates[image * per_image + index] for index in range(per_image)] for image in range(len(seed_keys))]


def generate_uniforms(seed_keys: Sequence[bytes], sentences: int, count: int, seed: int) -> Tensor:
    """Generates `count` random numbers from [0, 1) for each sentence, `[len(seed_keys) * sentences, count] float32`.

    The numbers depend only on the key of the image, the index of the sentence, and `seed`.
    """
    numbers = np.empty((len(seed_keys) * sentences, count), np.float32)
    for image, key in enumerate(seed_keys):
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        for index in range(sentences):
            generator = np.random.default_rng([seed, digest, index])
            numbers[image * sentences + index] = generator.random(count, np.float32)
    return torch.from_numpy(numbers)


def sample_tokens(log_probs: Tensor, uniforms: Tensor, config: DecodingConfig) -> Tensor:
    """Samples a word per row, `[rows] int64`, by inverse transform sampling.

    `log_probs` is `[rows, vocabulary_size]`, with -inf for forbidden words. `uniforms` is `[rows]`, from [0, 1).
    """
    scores, top_ids = log_probs / config.temperature, None
    if config.top_k is not None:
        scores, top_ids = scores.topk(min(config.top_k, scores.shape[1]), dim=1)
    probabilities = torch.softmax(scores, 1)
    if config.top_p < 1:
        sampled = _sample_nucleus(probabilities, uniforms, config.top_p)
    else:
        sampled = _invert_distribution(probabilities, uniforms)[:, 0]
    return sampled if top_ids is None else top_ids.gather(1, sampled[:, None])[:, 0]


def _sample_nucleus(probabilities: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """Samples a word per row from its nucleus: the most probable words with a total probability of at least `top_p`.

    Sorting the vocabulary would take longer than computing the probabilities. Instead, a word is sampled from all
    words. It is rejected if the total probability of the more probable words is at least `top_p`. The next word is
    sampled from these more probable words.
    """
    sampled = torch.empty_like(uniforms, dtype=torch.int64)
    rows = torch.arange(len(uniforms), device=uniforms.device)
    while len(rows):
        word = _invert_distribution(probabilities, uniforms)
        more_probable = probabilities.where(probabilities > probabilities.gather(1, word), 0)
        is_rejected = more_probable.sum(1) >= top_p
        sampled[rows[~is_rejected]] = word[~is_rejected, 0]
        rows, probabilities = rows[is_rejected], more_probable[is_rejected]
        uniforms = _derive_uniforms(uniforms[is_rejected])
    return sampled


def _derive_uniforms(uniforms: Tensor) -> Tensor:
    """Derives a new random number from each one; different numbers stay different."""
    bits = (uniforms * 2**24).long()
    for factor in (0x5BD1E9, 0x35A2D3):  # odd, so the multiplication is invertible
        bits = (bits * factor) % 2**24
        bits ^= bits >> 13
    return bits.float() / 2**24


def _invert_distribution(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Returns each row's first column whose cumulative sum exceeds the uniform number times the total, `[rows, 1]`."""
    sums = probabilities.cumsum(1)
    total = sums[:, -1:]
    # Rounding could make the product equal the total, and searchsorted would then return an index past the last word.
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, threshold, right=True)
