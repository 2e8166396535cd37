import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionlib.errors import ConfigError, SubprocessError
from captionlib.evaluation.tokenizer import tokenize_ptb

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


def test_the_tokens_are_pycocoevalcaps_own() -> None:
    own = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(SENTENCES)})
    assert tokenize_ptb(SENTENCES) == [own[number][0] for number in range(len(SENTENCES))]


def test_the_tokens_of_a_sentence_known_by_heart() -> None:
    assert tokenize_ptb(["A Dog's ball, isn't it?"]) == ["a dog 's ball is n't it"]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_a_line_break_within_a_sentence_starts_no_other(line_break: str) -> None:
    assert tokenize_ptb([f"one{line_break}two", "three"]) == ["one two", "three"]


def test_no_sentences_need_no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert tokenize_ptb([]) == []


def test_a_machine_without_java_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no `java` on the PATH; install a Java runtime"):
        tokenize_ptb(["a dog"])


def test_a_java_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-Xmx1k")
    with pytest.raises(SubprocessError, match=r"expected 1 lines of `java`, got \d and exit code 1: (.|\n)*heap"):
        tokenize_ptb(["a dog"])
