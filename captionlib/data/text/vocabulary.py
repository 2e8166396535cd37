"""The tokenizer, and the vocabulary that converts sentences to token ids and back.

Tokens are normalized words, subwords of normalized words (subwords.py), or unchanged characters.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from captionlib.config import build_config, to_dict
from captionlib.data.text.subwords import (
    SubwordAlgorithm,
    Subwords,
    join_subwords,
    make_tokenizer,
    mark_word_starts,
    train_subwords,
)
from captionlib.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["END", "PAD", "UNKNOWN", "Tokenization", "Vocabulary", "tokenize"]

Tokenization = Literal["words", "characters", "bpe", "unigram"]
"""Whether tokens are words, characters, or subwords found by BPE or a unigram language model."""

PAD = -1
"""Padding value after the end of a sentence in arrays of token ids. It is not a token and is ignored by models."""

END = 0
"""Sentence boundary: the last token that a model predicts. It is also the first input token, usually called START."""

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


def tokenize(sentence: str, tokenization: Tokenization = "words") -> list[str]:
    """Splits a sentence into words in the style of the Penn Treebank, or into characters with `characters`.

    With `bpe` and `unigram`, the result is words too; `Vocabulary` splits them into subwords. Words are lowercased, and
    punctuation is removed. Clitics become separate words: `isn't` becomes `is`, `n't`. Hyphenated words and numbers are
    kept (`t-shirt`, `1,000`). If the words are joined by spaces and tokenized again, the result is the same.
    """
    if tokenization == "characters":
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
    """The tokens of a model. The ids are 0 for END, 1 for UNKNOWN and i + 2 for `words[i]`."""

    words: tuple[str, ...]  # words, characters or subwords, by descending frequency and then alphabetically
    counts: tuple[int, ...]  # occurrences of each token in the training sentences
    unknown_count: int  # occurrences of tokens that are not in `words`
    sentence_count: int  # training sentences
    tokenization: Tokenization = "words"
    merges: tuple[tuple[str, str], ...] = ()  # for `bpe`, the pairs of subwords to merge, in this order
    scores: tuple[float, ...] = ()  # for `unigram`, ln p of each subword

    def __post_init__(self) -> None:
        size, counts = len(self.words), len(self.counts)
        if size != counts or len(set(self.words)) != size:
            raise ConfigError(
                f"vocabulary: expected distinct words with one count each, got {size} words and {counts} counts"
            )
        if len(self.scores) != (size if self.tokenization == "unigram" else 0) or not np.isfinite(self.scores).all():
            raise ConfigError(
                f"vocabulary: expected a finite score for each of {size} words with tokenization unigram, and no "
                f"scores with others, got {len(self.scores)} scores with tokenization {self.tokenization}"
            )
        known = set(self.words)
        are_known = all({*pair, "".join(pair)} <= known for pair in self.merges)
        if self.merges and (self.tokenization != "bpe" or not are_known):
            raise ConfigError(
                "vocabulary: expected merges only with tokenization bpe, and only between tokens of the vocabulary, "
                f"got {len(self.merges)} merges with tokenization {self.tokenization}"
            )

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], min_count: int = 5, tokenization: Tokenization = "words", size: int = 8000
    ) -> "Vocabulary":
        """Builds a vocabulary from training captions.

        With tokenization `words` and `characters`, tokens that occur fewer than `min_count` times are excluded. With
        `bpe` and `unigram`, the vocabulary has at most `size` subwords. They are learned from the words of the
        captions, without the words that contain a character with fewer than `min_count` occurrences.

        Raises:
            ConfigError: no token is frequent enough, `size` is too small, or the package that trains subwords is not
                installed.
        """
        counter, sentences = Counter[str](), 0
        for caption in captions:
            counter.update(tokenize(caption, tokenization))
            sentences += 1
        if tokenization in ("bpe", "unigram"):
            return cls._train_subwords(counter, sentences, min_count, tokenization, size)
        by_frequency = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
        frequent = [(word, count) for word, count in by_frequency if count >= min_count]
        if not frequent:
            raise ConfigError(
                f"vocabulary: expected {tokenization} that occur at least {min_count} times, got none in {sentences} "
                f"sentences with {len(counter)} different {tokenization}; use more sentences or a lower min_count"
            )
        words, counts = zip(*frequent, strict=True)
        return cls(words, counts, counter.total() - sum(counts), sentences, tokenization)

    @classmethod
    def _train_subwords(
        cls, word_counts: Mapping[str, int], sentences: int, min_count: int, algorithm: SubwordAlgorithm, size: int
    ) -> "Vocabulary":
        trained = train_subwords(word_counts, algorithm, size, min_count)
        if not trained.subwords:
            raise ConfigError(
                f"vocabulary: expected characters that occur at least {min_count} times, got none in {sentences} "
                "sentences; use more sentences or a lower min_count"
            )
        tokenizer = make_tokenizer(algorithm, trained)
        counter = Counter[int]()
        for word, count in word_counts.items():
            for subword_id in tokenizer.encode(mark_word_starts([word])).ids:  # 0: unknown; i + 1: trained.subwords[i]
                counter[subword_id] += count
        order = sorted(range(len(trained.subwords)), key=lambda i: (-counter[i + 1], trained.subwords[i]))
        return cls(
            tuple(trained.subwords[i] for i in order),
            tuple(counter[i + 1] for i in order),
            counter[0],
            sentences,
            algorithm,
            trained.merges,
            tuple(trained.scores[i] for i in order if trained.scores),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Vocabulary":
        """Creates a vocabulary from the output of `to_dict`. Raises ConfigError if `values` are invalid."""
        return build_config(cls, values, origin="vocabulary")

    def to_dict(self) -> dict[str, Any]:
        """Returns the vocabulary as JSON-compatible values."""
        return to_dict(self)

    def __len__(self) -> int:
        """Returns the number of softmax classes: END, UNKNOWN and `words`."""
        return _FIRST_ID + len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, start=_FIRST_ID)}

    @cached_property
    def _tokenizer(self) -> "Tokenizer | None":
        """Splits words into subwords; None unless the tokenization is `bpe` or `unigram`."""
        if self.tokenization in ("bpe", "unigram"):
            return make_tokenizer(self.tokenization, Subwords(self.words, self.merges, self.scores))
        return None

    @property
    def unit(self) -> str:
        """What the tokens are: words, characters or subwords."""
        return self.tokenization if self.tokenization in ("words", "characters") else "subwords"

    def encode(self, sentence: str) -> list[int]:
        """Returns the token ids of a sentence. END is not added."""
        return self.encode_tokens(self.tokenize(sentence))

    def tokenize(self, sentence: str) -> list[str]:
        """Splits a sentence into characters or words, the input of `encode_tokens`."""
        return tokenize(sentence, self.tokenization)

    def encode_tokens(self, tokens: Iterable[str]) -> list[int]:
        """Returns the token ids of the output of `tokenize`."""
        if self._tokenizer is not None:
            return [subword_id - 1 + _FIRST_ID for subword_id in self._tokenizer.encode(mark_word_starts(tokens)).ids]
        return [self._ids.get(token, UNKNOWN) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Converts token ids up to the first END or PAD to text. Words are separated by spaces."""
        words = []
        for index in ids:
            if index in (END, PAD):
                break
            words.append("<unk>" if index == UNKNOWN else self.words[index - _FIRST_ID])
        if self.unit == "subwords":
            return join_subwords(words)
        return (" " if self.tokenization == "words" else "").join(words)

    def log_frequencies(self) -> npt.NDArray[np.float32]:
        """Returns ln(fraction of the training tokens) per class, `[len(self)] float32`. Zero counts are set to 1."""
        counts = np.array([self.sentence_count, self.unknown_count, *self.counts], np.float64).clip(min=1)
        return cast(npt.NDArray[np.float32], np.log(counts / counts.sum()).astype(np.float32))

    def unigram_perplexity(self, sentences: Iterable[Sequence[int]]) -> float:
        """Computes the perplexity of the token ids of sentences under a model that uses only the token frequencies."""
        counts = Counter(chain.from_iterable(sentences))
        ids, occurrences = np.array(list(counts.items()), np.int64).T
        return float(np.exp(-np.average(self.log_frequencies()[ids], weights=occurrences)))
