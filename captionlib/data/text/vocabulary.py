"""Defines the tokenizer and the vocabulary, which converts sentences to token ids and back.

Tokens are either normalized words or unchanged characters.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from captionlib.config import build_config, to_dict
from captionlib.errors import ConfigError

__all__ = ["END", "PAD", "UNKNOWN", "Level", "Vocabulary", "tokenize"]

Level = Literal["words", "characters"]
"""Whether tokens are words or characters."""

PAD = -1
"""Padding value after the end of a sentence in arrays of token ids. It is not a token and is ignored by models."""

END = 0
"""Sentence boundary: the last target token of a sentence and also its first input token (called START)."""

UNKNOWN = 1
"""Replacement for tokens that are not in the vocabulary."""

_FIRST_ID = 2

# A letter or a digit, or any non-ASCII character that _normalize_character keeps (vowel signs, accents).
_CHARACTER = r"(?:[^\W_]|[^\x00-\x7f])"
_CLITIC = rf"(?:n't|'(?:s|m|d|re|ve|ll))(?=(?:n't)*(?!{_CHARACTER}))"
_TOKEN = re.compile(
    rf"{_CLITIC}"
    rf"|{_CHARACTER}(?:(?!{_CLITIC})(?:{_CHARACTER}|['-](?!{_CLITIC})(?={_CHARACTER})|(?<=\d)[.,](?=\d)))*"
    r"|[&$%#@+=]"
)


def tokenize(sentence: str, level: Level = "words") -> list[str]:
    """Splits a sentence into characters, or into words in the style of the Penn Treebank.

    Words are lowercased, and punctuation is removed. Clitics become separate words: `isn't` becomes `is`, `n't`.
    Hyphenated words and numbers are kept (`t-shirt`, `1,000`). Tokenizing the joined words returns the same words.
    """
    if level == "characters":
        return list(sentence)
    sentence = sentence.lower()
    if not sentence.isascii():
        sentence = "".join(map(_normalize_character, unicodedata.normalize("NFC", sentence)))
    return _TOKEN.findall(sentence)


@lru_cache(maxsize=4096)
def _normalize_character(character: str) -> str:
    """Converts typographic apostrophes and hyphens to ASCII, and other non-ASCII punctuation and symbols to spaces."""
    if character.isascii():
        return character
    if character in "\u2019\u2018\u02bc\uff07":
        return "'"
    if character in "\u2010\u2011":
        return "-"
    return " " if unicodedata.category(character)[0] in "PSZC" else character


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model. The ids are 0 for END, 1 for UNKNOWN and i + 2 for `words[i]`.

    Attributes:
        words: tokens (words or characters) in descending order of frequency, then in alphabetical order.
        counts: number of occurrences of each token in the training sentences.
        unknown_count: number of occurrences of tokens that are not in `words`.
        sentence_count: number of training sentences, which is also the number of occurrences of END.
        level: whether tokens are words or characters.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]
    unknown_count: int
    sentence_count: int
    level: Level = "words"

    def __post_init__(self) -> None:
        size, counts = len(self.words), len(self.counts)
        if size != counts or len(set(self.words)) != size:
            raise ConfigError(
                f"vocabulary: expected distinct words with one count each, got {size} words and {counts} counts"
            )

    @classmethod
    def from_captions(cls, captions: Iterable[str], min_count: int = 5, level: Level = "words") -> "Vocabulary":
        """Builds a vocabulary from training captions. Tokens that occur fewer than `min_count` times are excluded.

        Raises:
            ConfigError: there are no captions, or no token is frequent enough.
        """
        counter, sentences = Counter[str](), 0
        for caption in captions:
            counter.update(tokenize(caption, level))
            sentences += 1
        by_frequency = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
        frequent = [(word, count) for word, count in by_frequency if count >= min_count]
        if not frequent:
            raise ConfigError(
                f"vocabulary: expected {level} that occur at least {min_count} times, got none in {sentences} "
                f"sentences with {len(counter)} different {level}; use more sentences or a lower min_count"
            )
        words, counts = zip(*frequent, strict=True)
        return cls(words, counts, counter.total() - sum(counts), sentences, level)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Vocabulary":
        """Creates a vocabulary from the output of `to_dict`.

        Raises:
            ConfigError: `values` is not a valid output of `to_dict`.
        """
        return build_config(cls, values, origin="vocabulary")

    def to_dict(self) -> dict[str, Any]:
        """Returns the vocabulary as JSON-compatible values."""
        return to_dict(self)

    def __len__(self) -> int:
        """Returns the number of softmax classes: END, UNKNOWN and the other tokens."""
        return _FIRST_ID + len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, start=_FIRST_ID)}

    def encode(self, sentence: str) -> list[int]:
        """Returns the token ids of a sentence without END at its start and end."""
        return self.encode_tokens(self.tokenize(sentence))

    def tokenize(self, sentence: str) -> list[str]:
        return tokenize(sentence, self.level)

    def encode_tokens(self, tokens: Iterable[str]) -> list[int]:
        return [self._ids.get(token, UNKNOWN) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Converts token ids up to the first END or PAD to text. Words are separated by spaces."""
        words = []
        for index in ids:
            if index in (END, PAD):
                break
            words.append("<unk>" if index == UNKNOWN else self.words[index - _FIRST_ID])
        return (" " if self.level == "words" else "").join(words)

    def log_frequencies(self) -> npt.NDArray[np.float32]:
        """Returns ln(fraction of the training tokens) per class, `[len(self)] float32`. Zero counts are set to 1."""
        counts = np.array([self.sentence_count, self.unknown_count, *self.counts], np.float64).clip(min=1)
        return cast(npt.NDArray[np.float32], np.log(counts / counts.sum()).astype(np.float32))

    def unigram_perplexity(self, sentences: Iterable[Sequence[int]]) -> float:
        """Computes the perplexity of sentences under the word frequencies alone.

        `sentences` contains token ids, including END if END counts as a token.
        """
        counts = Counter(chain.from_iterable(sentences))
        ids, times = np.array(list(counts.items()), np.int64).T
        return float(np.exp(-np.average(self.log_frequencies()[ids], weights=times)))
