"""What may not be written next, whatever its probability."""

from collections.abc import Iterable

import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END, UNKNOWN, Vocabulary, tokenize
from captionlib.errors import ConfigError
from captionlib.models.decoding.config import DecodingConfig

__all__ = ["Constraints", "forbidden_ids"]


class Constraints:
    """Takes from the next words those that the configuration rules out.

    The others keep the probability that the model gives them.

    Args:
        config: what is ruled out.
        forbidden: ids of the words that are never written, from `forbidden_ids`.
    """

    def __init__(self, config: DecodingConfig, forbidden: Tensor) -> None:
        self._forbidden = forbidden
        self._min_words = config.min_words
        self._ngram = config.no_repeat_ngram_size

    def apply(self, log_probs: Tensor, words: Tensor) -> None:
        """Sets to -inf, in place, what may not be written.

        A row that nothing is left to may end, even before its time.

        Args:
            log_probs: `[rows, vocabulary_size] float32`, of the next word.
            words: `[rows, count] int64`, those written so far, without START.
        """
        too_short = words.shape[1] < self._min_words
        end = log_probs[:, END].clone() if too_short else None
        log_probs[:, self._forbidden] = -torch.inf
        if self._ngram and words.shape[1] >= self._ngram:
            self._forbid_repeats(log_probs, words)
        if end is not None:
            log_probs[:, END] = -torch.inf
            log_probs[:, END] = end.where(log_probs.amax(1) == -torch.inf, -torch.inf)

    def _forbid_repeats(self, log_probs: Tensor, words: Tensor) -> None:
        """Rules out the last word of every n-gram that stands there and begins with the last n - 1 words."""
        ngrams = words.unfold(1, self._ngram, 1)  # [rows, places, n]
        begun = words[:, None, words.shape[1] - self._ngram + 1 :]
        row, place = (ngrams[:, :, :-1] == begun).all(2).nonzero(as_tuple=True)
        log_probs[row, ngrams[row, place, -1]] = -torch.inf


def forbidden_ids(words: Iterable[str], vocabulary: Vocabulary | None) -> list[int]:
    """UNKNOWN, and the ids of these words; a word that the vocabulary lacks is not written anyway.

    Args:
        words: one word each, in any case.
        vocabulary: the model's; may be None where there are no words.

    Raises:
        ConfigError: one of them is no single word, or there is no vocabulary to look them up in.
    """
    ids = {UNKNOWN}
    for word in words:
        if vocabulary is None:
            raise ConfigError("decoding: forbidden_words need the model's vocabulary; give it to the Decoder")
        found = vocabulary.encode(word)
        if len(found) != 1:
            raise ConfigError(
                f"decoding: forbidden_words must be single words, got {word!r}, which is {len(found)}: "
                f"{' '.join(tokenize(word)) or 'nothing'}; give each word of its own"
            )
        ids.update(found)
    return sorted(ids)
