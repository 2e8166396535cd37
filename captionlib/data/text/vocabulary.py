"""Sentences to word ids and back: the tokeniser and the vocabulary, which lives inside the checkpoint.

At the level of characters each is a word of its own, and nothing is changed or left out.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from captionlib.errors import ConfigError

__all__ = ["END", "PAD", "UNKNOWN", "Level", "Vocabulary", "tokenize"]

Level = Literal["words", "characters"]
"""What a sentence is cut into."""

PAD = -1
"""Fills id matrices behind the end of a sentence; no word, so it is neither embedded nor scored."""

END = 0
"""The one boundary: it closes a sentence as a target and opens it, as START, as an input."""

UNKNOWN = 1
"""Every word that is rarer than the vocabulary's `min_count`."""

_FIRST_WORD = 2
_UNKNOWN_TEXT = "<unk>"

# A character of a word: a letter or digit, or anything beyond ASCII that _to_plain left there (vowel signs, accents).
_CHARACTER = r"(?:[^\W_]|[^\x00-\x7f])"
_CLITIC = rf"(?:n't|'(?:s|m|d|re|ve|ll))(?=(?:n't)*(?!{_CHARACTER}))"
_TOKEN = re.compile(
    rf"{_CLITIC}"
    rf"|{_CHARACTER}(?:(?!{_CLITIC})(?:{_CHARACTER}|['-](?!{_CLITIC})(?={_CHARACTER})|(?<=\d)[.,](?=\d)))*"
    r"|[&$%#@+=]"
)


def tokenize(sentence: str) -> list[str]:
    """Splits a sentence as the Penn Treebank does, in lower case and without punctuation.

    Clitics are words of their own (`dog's` is `dog`, `'s`; `isn't` is `is`, `n't`), hyphenated words and numbers stay
    whole (`t-shirt`, `1,000`). Splitting what was split and joined by spaces gives the same words again.
    """
    sentence = sentence.lower()
    if not sentence.isascii():
        sentence = "".join(map(_to_plain, unicodedata.normalize("NFC", sentence)))
    return _TOKEN.findall(sentence)


@lru_cache(maxsize=4096)
def _to_plain(character: str) -> str:
    """Typographic apostrophes and hyphens in ASCII; other punctuation, symbols and what is not seen as a space."""
    if character.isascii():
        return character
    if character in "\u2019\u2018\u02bc\uff07":
        return "'"
    if character in "\u2010\u2011":
        return "-"
    return " " if unicodedata.category(character)[0] in "PSZC" else character


@dataclass(frozen=True)
class Vocabulary:
    """The words a model knows. Ids: END 0, UNKNOWN 1, `words[i]` is `i + 2`.

    Attributes:
        words: the most frequent first, equally frequent ones by alphabet.
        counts: how often each occurs in the sentences counted.
        unknown_count: how often words occur that are not among them.
        sentences: how many sentences were counted; each has one END.
        level: whether the words are words, or characters.
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]
    unknown_count: int
    sentence_count: int
    level: Level = "words"

    @classmethod
    def from_captions(cls, captions: Iterable[str], min_count: int = 5, level: Level = "words") -> "Vocabulary":
        """Counts the words of the training captions; sentences of other splits would leak into the model.

        Args:
            captions: sentences as they were written; read once, not kept.
            min_count: words that occur less often become UNKNOWN.
            level: whether to count words, or characters.

        Raises:
            ConfigError: there are no captions, or none of their words is frequent enough.
        """
        counter: Counter[str] = Counter()
        sentences = 0
        for caption in captions:
            counter.update(_split(caption, level))
            sentences += 1
        kept = sorted(((word, count) for word, count in counter.items() if count >= min_count), key=_by_frequency)
        if not kept:
            raise ConfigError(
                f"vocabulary: expected {level} that occur at least {min_count} times, got {sentences} sentences with "
                f"{len(counter)} {level}, none so often; give more sentences or a lower min_count"
            )
        words, counts = zip(*kept, strict=True)
        return cls(words, counts, counter.total() - sum(counts), sentences, level)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Vocabulary":
        """The vocabulary that `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: `values` is something else.
        """
        words = tuple(str(word) for word in values["words"])
        counts = tuple(int(count) for count in values["counts"])
        if len(words) != len(counts) or len(set(words)) != len(words):
            raise ValueError(f"expected different words with a count each, got {len(words)} and {len(counts)} counts")
        level = values.get("level", "words")
        if level not in get_args(Level):
            raise ValueError(f"expected level {' or '.join(get_args(Level))}, got {level!r}")
        return cls(words, counts, int(values["unknown_count"]), int(values["sentence_count"]), level)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "words": list(self.words), "counts": list(self.counts)}

    def __len__(self) -> int:
        """The number of classes that a model chooses from: the words, END and UNKNOWN."""
        return _FIRST_WORD + len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, start=_FIRST_WORD)}

    def encode(self, sentence: str) -> list[int]:
        """The ids of a sentence's words, without START and END."""
        return self.encode_tokens(self.tokenize(sentence))

    def tokenize(self, sentence: str) -> list[str]:
        """The words or characters of a sentence."""
        return _split(sentence, self.level)

    def encode_tokens(self, tokens: Iterable[str]) -> list[int]:
        """The ids of words that are split already."""
        ids = self._ids
        return [ids.get(token, UNKNOWN) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of a sentence up to its END, if there is one, with a space between them; characters with none."""
        words = []
        for index in ids:
            if index in (END, PAD):
                break
            words.append(_UNKNOWN_TEXT if index == UNKNOWN else self.words[index - _FIRST_WORD])
        return (" " if self.level == "words" else "").join(words)

    def log_frequencies(self) -> npt.NDArray[np.float32]:
        """The natural logarithm of each class's share of all tokens, `[len(self)] float32`; one not seen counts 1."""
        counts = np.array([self.sentence_count, self.unknown_count, *self.counts], np.float64).clip(min=1)
        logarithms: npt.NDArray[np.float32] = np.log(counts / counts.sum()).astype(np.float32)
        return logarithms


def _split(sentence: str, level: Level) -> list[str]:
    return tokenize(sentence) if level == "words" else list(sentence)


def _by_frequency(entry: tuple[str, int]) -> tuple[int, str]:
    word, count = entry
    return -count, word
