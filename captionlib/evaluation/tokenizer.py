"""The Penn Treebank tokenizer that caption scores are defined with: Stanford's, in Java, out of pycocoevalcap."""

from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from captionlib.evaluation.java import run_java

__all__ = ["tokenize_ptb"]

_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)


def tokenize_ptb(sentences: Sequence[str]) -> list[str]:
    """Sentences in lower case, with a space between tokens and without punctuation, as pycocoevalcap gives them.

    pycocoevalcap's own wrapper writes into its installed package, takes a line break within a sentence for the start of
    the next one's, reads text in the encoding of the locale, and does not see when Java fails; so Java is run here.

    Raises:
        ConfigError: there is no Java, or it fails.
    """
    if not sentences:
        return []
    options = ["-cp", str(_JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = run_java("tokenizer of the scores", options, [" ".join(sentence.splitlines()) for sentence in sentences])
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in lines]
