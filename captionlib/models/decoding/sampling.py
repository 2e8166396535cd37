"""Draws sentences as likely as the model finds them, for many images at once.

Every sentence has its own random numbers, which come of the seed, its image and its number alone: what else is in the
batch changes nothing, nor does the order, or how many sentences are drawn.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END
from captionlib.models.decoding.candidate import Candidate
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.constraints import Constraints
from captionlib.models.decoding.incremental import Hypotheses, IncrementalCaptioner

__all__ = ["generate_uniforms", "sample_captions", "sample_tokens"]


def sample_captions(
    incremental: IncrementalCaptioner,
    config: DecodingConfig,
    constraints: Constraints,
    start: Hypotheses,
    keys: Sequence[bytes],
) -> list[list[Candidate]]:
    """`n_best` sentences for each image, in the order of their numbers; equal ones as often as they are drawn.

    Args:
        incremental: the captioner.
        config: how they are drawn.
        constraints: what they may not contain.
        start: the images, and how their sentences begin.
        keys: what tells each image from others, for its random numbers.
    """
    device, each = incremental.device, config.n_best
    sentence = torch.arange(len(keys) * each, device=device)  # of each row that is still written
    log_prob, words, state = start.select(sentence // each)
    begun = words.shape[1] - 1
    uniforms = generate_uniforms(keys, each, config.max_tokens - begun, config.seed).to(device)
    drawn: dict[int, Candidate] = {}
    for tick in range(config.max_tokens - begun):
        if not len(sentence):
            break
        log_probs, state = incremental.step(state, words[:, -1])
        constraints.apply(log_probs, words[:, 1:])
        word = sample_tokens(log_probs, uniforms[sentence, tick], config)
        log_prob = log_prob + log_probs.gather(1, word[:, None])[:, 0]
        words = torch.cat([words, word[:, None]], 1)
        ended = (word == END) | (tick == config.max_tokens - begun - 1)
        if ended.any():
            rows = zip(sentence[ended].tolist(), log_prob[ended].tolist(), words[ended, 1:].tolist(), strict=True)
            for number, total, ids in rows:
                drawn[number] = Candidate(ids[:-1] if ids[-1] == END else ids, total, token_count=len(ids))
            left = (~ended).nonzero()[:, 0]
            sentence, log_prob, words, state = sentence[left], log_prob[left], words[left], state.select(left)
    return [[drawn[number] for number in range(image * each, (image + 1) * each)] for image in range(len(keys))]


def generate_uniforms(keys: Sequence[bytes], each: int, count: int, seed: int) -> Tensor:
    """Numbers from 0 to below 1, `[len(keys) * each, count] float32`, a row a sentence."""
    numbers = np.empty((len(keys) * each, count), np.float32)
    for image, key in enumerate(keys):
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        for number in range(each):
            numbers[image * each + number] = np.random.default_rng([seed, digest, number]).random(count, np.float32)
    return torch.from_numpy(numbers)


def sample_tokens(log_probs: Tensor, uniforms: Tensor, config: DecodingConfig) -> Tensor:
    """Draws a word a row: the first whose probability and those before it add up to more than the row's number.

    Args:
        log_probs: `[rows, vocabulary_size] float32`, -inf for what may not be written.
        uniforms: `[rows] float32`, from 0 to below 1.
        config: what is drawn from.

    Returns:
        `[rows] int64`.
    """
    scores, word = log_probs / config.temperature, None
    if config.top_k is not None:
        scores, word = scores.topk(min(config.top_k, scores.shape[1]), dim=1)
    elif config.top_p < 1:
        scores, word = scores.sort(dim=1, descending=True)
    probabilities = torch.softmax(scores, 1)
    if config.top_p < 1:
        before = probabilities.cumsum(1) - probabilities
        probabilities[:, 1:] = probabilities[:, 1:].where(before[:, 1:] < config.top_p, 0)
    sums = probabilities.cumsum(1)
    total = sums[:, -1:]
    # Rounding could lift the product to the total, which no word's sum exceeds.
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(sums, wanted, right=True)
    return place[:, 0] if word is None else word.gather(1, place)[:, 0]
