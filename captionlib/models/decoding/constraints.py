"""Constraints on the next word, whatever its probability."""

from collections.abc import Iterable

import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END, UNKNOWN, Vocabulary, tokenize
from captionlib.errors import ConfigError
from captionlib.models.decoding.config import DecodingConfig

__all__ = ["Constraints", "find_forbidden_ids"]


class Constraints:
    """Forbids the words of `find_forbidden_ids`, repeated n-grams and early ENDs. Others keep their probability."""

    def __init__(self, config: DecodingConfig, forbidden: Tensor) -> None:
        self._forbidden = forbidden
        self._min_words = config.min_words
        self._ngram_size = config.no_repeat_ngram_size

    def apply(self, log_probs: Tensor, words: Tensor) -> None:
        """Sets forbidden words to -inf, in place. A row without any allowed word may end, even if it is too short.

        Args:
            log_probs: `[rows, vocabulary_size] float32`, of the next word.
            words: `[rows, count] int64`, the words so far, without START.
        """
        too_short = words.shape[1] < self._min_words
        end = log_probs[:, END].clone() if too_short else None
        log_probs[:, self._forbidden] = -torch.inf
        if self._ngram_size and words.shape[1] >= self._ngram_size:
            self._forbid_repeats(log_probs, words)
        if end is not None:
            log_probs[:, END] = -torch.inf
            log_probs[:, END] = end.where(log_probs.amax(1) == -torch.inf, -torch.inf)

    def _forbid_repeats(self, log_probs: Tensor, words: Tensor) -> None:
        """Forbids the last word of every n-gram of the row that begins with the row's last n - 1 words."""
        ngrams = words.unfold(1, self._ngram_size, 1)  # [rows, positions, n]
        ending = words[:, None, words.shape[1] - self._ngram_size + 1 :]  # [rows, 1, n - 1]
        row, position = (ngrams[:, :, :-1] == ending).all(2).nonzero(as_tuple=True)
        log_probs[row, ngrams[row, position, -1]] = -torch.inf


def find_forbidden_ids(words: Iterable[str], vocabulary: Vocabulary | None) -> list[int]:
    """Returns UNKNOWN and the ids of the words, in any case. A word outside the vocabulary is never written anyway.

    Raises:
        ConfigError: an entry is not a single word, or there is no vocabulary.
    """
    forbidden = {UNKNOWN}
    for word in words:
        if vocabulary is None:
            raise ConfigError("decoding: forbidden_words need the model's vocabulary; pass it to the Decoder")
        ids = vocabulary.encode(word)
        if len(ids) != 1:
            raise ConfigError(
                f"decoding: forbidden_words must be single words, got {word!r}, which is {len(ids)}: "
                f"{' '.join(tokenize(word)) or 'nothing'}; list each word separately"
            )
        forbidden.update(ids)
    return sorted(forbidden)
