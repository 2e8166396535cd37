import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from captionlib.data.text.vocabulary import END, PAD, UNKNOWN, Vocabulary, tokenize
from captionlib.errors import ConfigError


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("A dog runs , jumps (and barks) !", ["a", "dog", "runs", "jumps", "and", "barks"]),
        ("The dog's tail isn't wagging.", ["the", "dog", "'s", "tail", "is", "n't", "wagging"]),
        ("They can't; we're 5th.", ["they", "ca", "n't", "we", "'re", "5th"]),
        (
            "A t-shirt -- black/white, $1,000 or 3.5 m.",
            ["a", "t-shirt", "black", "white", "$", "1,000", "or", "3.5", "m"],
        ),
        ("'Rock 'n' roll' \"at\" five o'clock", ["rock", "n", "roll", "at", "five", "o'clock"]),
        ("Café\u0301 naïve don\u2019t \u201cx\u201d …", ["café\u0301", "naïve", "do", "n't", "x"]),
        ("नमस्ते दुनिया। 狗", ["नमस्ते", "दुनिया", "狗"]),
        (" \t\n\u200b _ 🐕 ... ", []),
    ],
)
def test_tokenize_splits_like_the_penn_treebank(sentence: str, words: list[str]) -> None:
    assert tokenize(sentence) == words


@given(st.text() | st.text(alphabet="nt's-.,1é \u2019"))
def test_tokenize_is_idempotent(sentence: str) -> None:
    words = tokenize(sentence)
    assert tokenize(" ".join(words)) == words
    assert all(words)
    assert not any(character.isspace() for word in words for character in word)


def test_from_captions_drops_rare_words_and_sorts_by_frequency() -> None:
    vocabulary = Vocabulary.from_captions(["A red dog.", "a cat", "a blue cat", "a dog"], min_count=2)
    assert vocabulary.words == ("a", "cat", "dog")  # cat and dog are equally frequent
    assert vocabulary.counts == (4, 2, 2)
    assert vocabulary.unknown_count == 2  # red, blue
    assert vocabulary.sentence_count == 4
    assert len(vocabulary) == 5


def test_encode_and_decode_convert_sentences() -> None:
    vocabulary = Vocabulary.from_captions(["a dog and a cat"], min_count=1)
    assert vocabulary.words == ("a", "and", "cat", "dog")
    assert vocabulary.encode("A zebra, and a DOG!") == [2, UNKNOWN, 3, 2, 5]
    assert vocabulary.decode([2, UNKNOWN, 5, END, 4]) == "a <unk> dog"
    assert vocabulary.decode([2, 5, PAD, PAD]) == "a dog"


def test_log_frequencies_are_shares_of_all_tokens() -> None:
    vocabulary = Vocabulary.from_captions(["a dog", "a cat", "a cow"], min_count=3)
    # 9 tokens: 3 END, 3 UNKNOWN (dog, cat, cow), 3 "a"
    assert vocabulary.log_frequencies() == pytest.approx([math.log(3 / 9)] * 3)


def test_log_frequencies_are_finite_without_unknown_words() -> None:
    assert np.isfinite(Vocabulary.from_captions(["a dog"], min_count=1).log_frequencies()).all()


def test_from_captions_reports_counts_if_no_word_is_frequent() -> None:
    with pytest.raises(ConfigError, match="at least 5 times, got none in 2 sentences with 3 different words"):
        Vocabulary.from_captions(["a dog", "a cat"])


sentences = st.lists(st.lists(st.sampled_from(["dog", "cat", "n't", "'s", "t-shirt", "1,000", "über"]), max_size=9))


@given(sentences.filter(any))
def test_known_sentences_round_trip(sentences: list[list[str]]) -> None:
    captions = [" ".join(words) for words in sentences]
    vocabulary = Vocabulary.from_captions(captions, min_count=1)
    assert [vocabulary.decode(vocabulary.encode(caption)) for caption in captions] == captions
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    assert sum(vocabulary.counts) == sum(map(len, sentences))


def test_from_dict_rejects_duplicate_words() -> None:
    values = {"words": ["a", "a"], "counts": [1, 1], "unknown_count": 0, "sentence_count": 1}
    with pytest.raises(ConfigError, match="distinct words"):
        Vocabulary.from_dict(values)


def test_character_level_keeps_every_character() -> None:
    vocabulary = Vocabulary.from_captions(["Aha, a dog.\n"], min_count=1, tokenization="characters")
    assert set(vocabulary.words) == set("Aha, dog.\n")
    assert vocabulary.decode(vocabulary.encode("a dog, Aha.\n")) == "a dog, Aha.\n"
    assert vocabulary.encode("z") == [UNKNOWN]
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def test_from_dict_rejects_an_unknown_level() -> None:
    values = Vocabulary.from_captions(["a dog"], min_count=1).to_dict()
    without_tokenization = {name: value for name, value in values.items() if name != "tokenization"}
    assert Vocabulary.from_dict(without_tokenization).tokenization == "words"
    with pytest.raises(
        ConfigError, match="tokenization: Input should be 'words', 'characters', 'bpe' or 'unigram', got 'syllables'"
    ):
        Vocabulary.from_dict({**values, "tokenization": "syllables"})
