"""The Penn Treebank tokenizer that caption scores are defined with: Stanford's, in Java, out of pycocoevalcap."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from captionlib.errors import ConfigError

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
    if shutil.which("java") is None:
        raise ConfigError(
            "the scores need Java for the tokenizer that they are defined with, and there is no `java` on the PATH; "
            "install a Java runtime (version 8 or later)"
        )
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(_JAR)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{' '.join(sentence.splitlines())}\n" for sentence in sentences)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    lines = done.stdout.decode(errors="replace").removesuffix("\n").split("\n")
    if done.returncode != 0 or len(lines) != len(sentences):
        said = (done.stderr + done.stdout[-500:]).decode(errors="replace").strip()[-500:]  # Java may use either
        raise ConfigError(
            f"the tokenizer of the scores failed: expected {len(sentences)} lines of `java`, got {len(lines)} and exit "
            f"code {done.returncode}: {said}; check that `java` runs"
        )
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in lines]
