"""Samples texts from a language model."""

from dataclasses import dataclass, replace

import torch

from captionlib.data.text.vocabulary import UNKNOWN
from captionlib.errors import ConfigError
from captionlib.models.checkpoints.checkpoint import LoadedLanguageModel
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder

__all__ = ["TextSample", "sample_texts"]

_BATCH_SIZE = 100


@dataclass(frozen=True)
class TextSample:
    """A text written by a language model.

    Attributes:
        text: the prefix and its continuation.
        log_prob: ln p(text), the prefix included.
        tokens: the number of words or characters, and END if it was reached.
    """

    text: str
    log_prob: float
    tokens: int


def sample_texts(
    language_model: LoadedLanguageModel, config: DecodingConfig, count: int, prefix: str = ""
) -> list[TextSample]:
    """Samples sentences, or passages of running text.

    Args:
        language_model: the model.
        config: how texts are sampled. After the prefix, sentences have at most `max_tokens` tokens and running text,
            which has no end, has exactly as many.
        count: how many texts. With the same seed, a larger count adds texts to those of a smaller one.
        prefix: the beginning of every text.

    Raises:
        ConfigError: the prefix contains a word or character that the model does not know.
    """
    vocabulary = language_model.vocabulary
    ids = vocabulary.encode(prefix)
    if UNKNOWN in ids:
        unknown = [part for part in vocabulary.tokenize(prefix) if vocabulary.encode_tokens([part]) == [UNKNOWN]]
        raise ConfigError(
            f"prefix: expected {vocabulary.level} of the model's vocabulary, got {', '.join(map(repr, unknown))}; "
            "use others"
        )
    longest = len(ids) + config.max_tokens
    shortest = longest if language_model.layout == "continuous" else config.min_words
    bounded = replace(config, max_tokens=longest, min_words=shortest, n_best=1)
    decoder = Decoder(language_model.model, bounded, vocabulary=vocabulary)
    samples: list[TextSample] = []
    for start in range(0, count, _BATCH_SIZE):
        keys = [str(number) for number in range(start, min(start + _BATCH_SIZE, count))]
        for (candidate,) in decoder.decode(torch.zeros(len(keys), 0), keys, ids):
            text = vocabulary.decode(candidate.token_ids)
            samples.append(TextSample(text, candidate.log_prob, candidate.token_count))
    return samples
