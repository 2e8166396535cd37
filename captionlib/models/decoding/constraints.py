"""Hard constraints on the next word of a caption."""

from collections.abc import Iterable

import torch
from torch import Tensor

from captionlib.data.text.vocabulary import END, UNKNOWN, Vocabulary, tokenize
from captionlib.errors import ConfigError
from captionlib.models.decoding.config import DecodingConfig

__all__ = ["Constraints", "find_forbidden_ids"]


class Constraints:
    """Forbids the words `forbidden` (ids), repeated n-grams, and END in short sentences.

    Other words keep their probability.
    """

    def __init__(self, config: DecodingConfig, forbidden: Tensor) -> None:
        self._forbidden = forbidden
        self._min_words = config.min_words
        self._ngram_size = config.no_repeat_ngram_size

    def apply(self, log_probs: Tensor, words: Tensor) -> None:
        """Sets the log-probability of forbidden words to -inf, in place. END is allowed if no other word is.

        `log_probs` is `[rows, vocabulary_size]`. `words` is `[rows, count]`, the words after the start token.
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
        ngrams = words.unfold(1, self._ngram_size, 1)  # [rows, positions, n]
        ending = words[:, None, words.shape[1] - self._ngram_size + 1 :]  # [rows, 1, n - 1]
        row, position = (ngrams[:, :, :-1] == ending).all(2).nonzero(as_tuple=True)
        log_probs[row, ngrams[row, position, -1]] = -torch.inf


def find_forbidden_ids(words: Iterable[str], vocabulary: Vocabulary | None) -> list[int]:
    """Returns the ids of `words`, ignoring case, and of UNKNOWN, which stands for all words outside the vocabulary.

    Raises:
        ConfigError: an entry is not a single word, the vocabulary is missing, or its tokens are subwords.
    """
    forbidden = {UNKNOWN}
    for word in words:
        if vocabulary is None:
            raise ConfigError("decoding: forbidden_words need the model's vocabulary; pass it to the Decoder")
        if vocabulary.unit == "subwords":
            raise ConfigError(
                "decoding: forbidden_words need a model of whole words, got one of subwords "
                f"({vocabulary.tokenization}), which can spell a word in several ways; leave forbidden_words out"
            )
        ids = vocabulary.encode(word)
        if len(ids) != 1:
            raise ConfigError(
                f"decoding: forbidden_words must be single words, got {word!r}, which is {len(ids)} words: "
                f"{' '.join(tokenize(word)) or 'nothing'}; list each word separately"
            )
        forbidden.update(ids)
    return sorted(forbidden)
