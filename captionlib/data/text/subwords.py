"""Trains subwords, and splits words into them, with Hugging Face's `tokenizers`.

    bpe      merges the most frequent pair of adjacent subwords, repeatedly (Sennrich et al. 2016, arXiv 1508.07909)
    unigram  splits a word into its most probable subwords (Kudo 2018, arXiv 1804.10959)

The first subword of a word starts with the character U+2581, which no word contains.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from captionlib.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SubwordAlgorithm", "Subwords", "join_subwords", "make_tokenizer", "mark_word_starts", "train_subwords"]

SubwordAlgorithm = Literal["bpe", "unigram"]
"""Algorithm that trains subwords. The `tokenization` of a vocabulary is one of these, `words` or `characters`."""

_WORD_START = "\u2581"
_UNKNOWN = "<unk>"  # id 0 of the tokenizer; no word contains the symbol <
# The training of `unigram` drops some single characters and adds them again in a random order, with scores that rise
# by _SCORE_STEP from the lowest score. To make training reproducible, all of them get the lowest score here. Scores are
# rounded, because the library also computes sums in a random order.
_SCORE_STEP = 1e-4
_SCORE_DECIMALS = 6


class Subwords(NamedTuple):
    """Trained subwords, in any order."""

    subwords: tuple[str, ...]
    merges: tuple[tuple[str, str], ...] = ()  # for `bpe`, the pairs to merge, in this order
    scores: tuple[float, ...] = ()  # for `unigram`, the log-probability of each subword


def train_subwords(words: Mapping[str, int], algorithm: SubwordAlgorithm, size: int, min_count: int) -> Subwords:
    """Trains at most `size` subwords on words and their frequencies. The order of the words has no effect.

    Words that contain a character with fewer than `min_count` occurrences are excluded. `bpe` does not merge pairs with
    fewer than `min_count` occurrences.

    Raises:
        ConfigError: `tokenizers` is not installed, or the words that remain have at least `size` different characters.
    """
    _require_tokenizers()
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    characters = Counter[str]()
    for word, count in words.items():
        characters.update({character: count * word.count(character) for character in set(word)})
    kept = {word: count for word, count in words.items() if all(characters[c] >= min_count for c in word)}
    alphabet = {character for word in kept for character in word}
    if len(alphabet) >= size:  # _WORD_START is one more character
        raise ConfigError(
            f"vocabulary_size: expected more than {len(alphabet)}, the number of different characters in the captions, "
            f"got {size}; raise vocabulary_size or min_count"
        )
    options: dict[str, Any] = {"vocab_size": size + 1, "special_tokens": [_UNKNOWN], "show_progress": False}
    if algorithm == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
        trainer: Any = trainers.BpeTrainer(min_frequency=min_count, **options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(unk_token=_UNKNOWN, **options)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marked = (repeat(_WORD_START + word, count) for word, count in sorted(kept.items()))
    tokenizer.train_from_iterator(chain.from_iterable(marked), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    if algorithm == "bpe":
        return Subwords(tuple(sorted({*model["vocab"]} - {_UNKNOWN})), merges=tuple(map(tuple, model["merges"])))
    scores = {subword: score for subword, score in sorted(model["vocab"]) if subword != _UNKNOWN}
    lowest = min(scores.values(), default=0.0)
    limit = lowest + _SCORE_STEP * (len(alphabet) + 1)  # of the scores of added characters
    rounded = (
        round(lowest if len(subword) == 1 and score < limit else score, _SCORE_DECIMALS)
        for subword, score in scores.items()
    )
    return Subwords(tuple(scores), scores=tuple(rounded))


def make_tokenizer(algorithm: SubwordAlgorithm, trained: Subwords) -> "Tokenizer":
    """Returns a tokenizer for the output of `mark_word_starts`. Ids: 0 for <unk>, i + 1 for `trained.subwords[i]`."""
    _require_tokenizers()
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {subword: subword_id for subword_id, subword in enumerate((_UNKNOWN, *trained.subwords))}
    if algorithm == "bpe":
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(trained.merges), unk_token=_UNKNOWN))
    else:
        scores = list(zip(ids, (0.0, *trained.scores), strict=True))
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def mark_word_starts(words: Iterable[str]) -> str:
    """Returns the words as one text, in which the start of each word is marked."""
    return " ".join(_WORD_START + word for word in words)


def join_subwords(subwords: Sequence[str]) -> str:
    """Joins subwords into words, separated by spaces."""
    return "".join(subwords).replace(_WORD_START, " ").strip()


def _require_tokenizers() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise the library warns in forked processes
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "subwords (bpe and unigram) need an extra package; run pip install 'captionlib[subwords]'"
        ) from error
