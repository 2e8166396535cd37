import json
import sys
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings, strategies as st

from captionlib.data.text.vocabulary import END, UNKNOWN, Vocabulary, tokenize
from captionlib.errors import ConfigError

CAPTIONS = [
    "A dog runs on the grass.",
    "Two dogs are running on green grass",
    "The dog's ball is on the ground",
    "a man runs and a woman isn't running",
    "\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a\u5954\u8dd1\u3002",
] * 3
BOTH = pytest.mark.parametrize("tokenization", ["bpe", "unigram"])
Tokenization = Literal["bpe", "unigram"]


def build(tokenization: Tokenization, size: int = 80, min_count: int = 1) -> Vocabulary:
    return Vocabulary.from_captions(CAPTIONS, min_count, tokenization, size)


VOCABULARIES = {"bpe": build("bpe"), "unigram": build("unigram")}
known = st.text(sorted({character for caption in CAPTIONS for character in caption}), max_size=60)


@BOTH
@settings(deadline=None)
@given(text=known | st.sampled_from(CAPTIONS))
def test_text_of_known_characters_round_trips(tokenization: Tokenization, text: str) -> None:
    vocabulary = VOCABULARIES[tokenization]
    ids = vocabulary.encode(text)
    assert END not in ids
    assert UNKNOWN not in ids
    assert vocabulary.decode(ids) == " ".join(tokenize(text))
    assert vocabulary.decode([*ids, END, 2]) == vocabulary.decode(ids)


@BOTH
@settings(deadline=None)
@given(text=st.text())
def test_any_text_becomes_valid_ids(tokenization: Tokenization, text: str) -> None:
    vocabulary = VOCABULARIES[tokenization]
    ids = vocabulary.encode(text)
    assert all(UNKNOWN <= number < len(vocabulary) for number in ids)
    assert (vocabulary.decode(ids) == " ".join(tokenize(text))) == (UNKNOWN not in ids)


@BOTH
def test_rare_words_are_split_and_frequent_ones_are_not(tokenization: Tokenization) -> None:
    vocabulary = VOCABULARIES[tokenization]
    assert len(vocabulary) <= 82
    assert len(vocabulary.encode("dog")) == 1
    assert len(vocabulary.encode("runs")) <= 2 < len(vocabulary.encode("womans"))
    assert list(vocabulary.counts) == sorted(vocabulary.counts, reverse=True)
    assert sum(vocabulary.counts) == sum(len(vocabulary.encode(caption)) for caption in CAPTIONS)
    assert vocabulary.unknown_count == 0
    assert vocabulary.sentence_count == len(CAPTIONS)


@BOTH
def test_vocabulary_is_json_and_splits_as_before(tokenization: Tokenization) -> None:
    vocabulary = VOCABULARIES[tokenization]
    loaded = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert loaded == vocabulary
    assert [loaded.encode(caption) for caption in CAPTIONS] == [vocabulary.encode(caption) for caption in CAPTIONS]


@BOTH
def test_the_same_captions_in_any_order_give_the_same_vocabulary(tokenization: Tokenization) -> None:
    for _ in range(3):
        assert Vocabulary.from_captions(reversed(CAPTIONS), 1, tokenization, 80) == VOCABULARIES[tokenization]


@BOTH
def test_rare_characters_are_unknown(tokenization: Tokenization) -> None:
    vocabulary = Vocabulary.from_captions([*CAPTIONS, "a zebra"], 2, tokenization, 80)
    assert not any("z" in word for word in vocabulary.words)
    assert vocabulary.unknown_count == 1
    assert vocabulary.decode(vocabulary.encode("zoo")) == "<unk>oo"


@BOTH
def test_rejects_impossible_sizes_and_captions(tokenization: Tokenization) -> None:
    with pytest.raises(
        ConfigError, match=r"vocabulary_size: expected more than \d+, the number .*, got 5; raise vocabulary_size or"
    ):
        build(tokenization, size=5)
    with pytest.raises(ConfigError, match="characters that occur at least 99 times, got none in 15 sentences"):
        build(tokenization, min_count=99)


@pytest.mark.parametrize(
    ("tokenization", "changes", "message"),
    [
        ("bpe", {"merges": [["d", "zz"]]}, "expected merges only with tokenization bpe"),
        ("unigram", {"merges": [["d", "o"]]}, "expected merges only with tokenization bpe"),
        ("unigram", {"scores": [1.0]}, "expected a finite score for each of"),
        ("bpe", {"scores": [1.0]}, "expected a finite score for each of"),
    ],
)
def test_damaged_vocabularies_are_rejected(tokenization: Tokenization, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Vocabulary.from_dict({**VOCABULARIES[tokenization].to_dict(), **changes})
    with pytest.raises(ConfigError, match="finite score"):
        replace(VOCABULARIES["unigram"], scores=(float("nan"),) * len(VOCABULARIES["unigram"].words))


@BOTH
def test_missing_package_is_named(tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"run pip install 'captionlib\[subwords\]'"):
        build(tokenization)
    loaded = Vocabulary.from_dict(VOCABULARIES[tokenization].to_dict())
    assert loaded.decode([2]) == VOCABULARIES[tokenization].decode([2])
    with pytest.raises(ConfigError, match=r"run pip install 'captionlib\[subwords\]'"):
        loaded.encode("a dog")
