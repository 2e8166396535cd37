import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionlib.errors import ConfigError, SubprocessError
from captionlib.evaluation.java import count_alignments, tokenize_ptb

SENTENCES = [
    "A dog's T-shirt isn't red, is it?",
    "Two men (one tall) -- both smiling...",
    "",
    "   ",
    "!?",
    'He said "look": 3/4 of U.S. dogs cost $5.00 & more.',
    "a café on naïve street, 犬 “quoted” \u2013 it\u2019s",
    "can't won't gonna :-) me@x.org",
    "",
]


def test_tokens_equal_those_of_pycocoevalcap() -> None:
    expected = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(SENTENCES)})
    assert tokenize_ptb(SENTENCES) == [expected[number][0] for number in range(len(SENTENCES))]


def test_tokens_of_a_known_sentence() -> None:
    assert tokenize_ptb(["A Dog's ball, isn't it?"]) == ["a dog 's ball is n't it"]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_line_break_does_not_split_a_sentence(line_break: str) -> None:
    assert tokenize_ptb([f"one{line_break}two", "three"]) == ["one two", "three"]


def test_no_sentences_are_tokenized_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert tokenize_ptb([]) == []


def test_missing_java_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="`java` is not on the PATH; install a Java runtime"):
        tokenize_ptb(["a dog"])


def test_failing_java_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-Xmx1k")
    with pytest.raises(SubprocessError, match=r"expected 1 lines of output, got \d and exit code 1: (.|\n)*heap"):
        tokenize_ptb(["a dog"])


def test_meteor_ignores_its_separator_within_a_sentence() -> None:
    with_separator, without = count_alignments([("a dog ||| runs", ["a ||| dog"]), ("a dog runs", ["a dog"])]).tolist()
    assert with_separator == without


def test_meteor_without_java_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="METEOR score needs Java"):
        count_alignments([("a dog", ["a dog"])])
