"""Runs the two Java programs behind the standard caption metrics: Stanford's PTB tokenizer and METEOR 1.5.

Both ship with pycocoevalcap. That package's wrappers decode text with the locale's encoding, do not detect that Java
failed (METEOR's wrapper hangs), and end a caption at its first line break. This module replaces the wrappers.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer

from captionlib.errors import ConfigError, SubprocessError

__all__ = ["count_alignments", "has_java", "tokenize_ptb"]

_TOKENIZER_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
_METEOR_JAR = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
_METEOR_STATISTICS = 23  # per caption; see `count_alignments`
_METEOR_SEPARATOR = "|||"
_JAVA = ("java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")


def has_java() -> bool:
    """Returns whether `java` is on the PATH."""
    return shutil.which("java") is not None


def tokenize_ptb(texts: Sequence[str]) -> list[str]:
    """Tokenizes as pycocoevalcap does. The results are in lower case, without punctuation, joined by spaces."""
    if not texts:
        return []
    arguments = ["-cp", str(_TOKENIZER_JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = _run_java("PTB tokenizer", arguments, [" ".join(text.splitlines()) for text in texts])
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in lines]


def count_alignments(pairs: Sequence[tuple[str, Sequence[str]]]) -> npt.NDArray[np.float64]:
    """Returns METEOR's counts, which can be summed, for each caption and its best-matching reference.

    Columns 0 and 1 count the words of the caption and of the reference, and columns 2 and 3 count their function words.
    Columns 4 to 19 count the matches of four kinds (exact, stem, synonym, paraphrase). Each kind has four columns: the
    content words of the caption and of the reference, then the function words of both. Column 20 is the number of
    chunks of adjacent matches. It is 0 if all words of both match in one chunk, because the score then has no penalty
    for fragmentation. Columns 21 and 22 count the matched words of both.

    Captions and references are tokenized and joined by spaces. The counts are `[captions, 23]`.
    """
    lines = [
        f" {_METEOR_SEPARATOR} ".join(["SCORE", *map(_remove_separators, references), _remove_separators(caption)])
        for caption, references in pairs
    ]
    arguments = ["-Xmx2G", "-jar", _METEOR_JAR.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    output = _run_java("METEOR score", arguments, lines, folder=_METEOR_JAR.parent)
    try:
        counts = np.array([line.split() for line in output], np.float64).reshape(len(lines), _METEOR_STATISTICS)
    except ValueError as error:
        raise SubprocessError(
            f"METEOR: expected {_METEOR_STATISTICS} numbers per caption, got {output[0]!r:.200}; check that `java` runs"
        ) from error
    lengths, chunks, matched = counts[:, 0:2], counts[:, 20], counts[:, 21:23]
    counts[(lengths == matched).all(1) & (chunks == 1), 20] = 0
    return counts


def _remove_separators(text: str) -> str:
    return " ".join(token for token in text.split(" ") if _METEOR_SEPARATOR not in token)


def _run_java(program: str, arguments: Sequence[str], lines: Sequence[str], folder: Path | None = None) -> list[str]:
    """Runs a Java program that prints one line for each input line, and returns these lines.

    Raises:
        ConfigError: Java is not installed.
        SubprocessError: the program fails.
    """
    if not has_java():
        raise ConfigError(
            f"the {program} needs Java, but `java` is not on the PATH; install a Java runtime (version 8 or later)"
        )
    command = [*_JAVA, *arguments]
    text = "".join(f"{line}\n" for line in lines)
    process = subprocess.run(command, input=text.encode(), capture_output=True, check=False, cwd=folder)
    output = process.stdout.decode(errors="replace").removesuffix("\n").split("\n")
    if process.returncode != 0 or len(output) != len(lines):
        # Java writes its own errors to either stream.
        message = (process.stderr + process.stdout[-500:]).decode(errors="replace").strip()[-500:]
        raise SubprocessError(
            f"the {program} failed: expected {len(lines)} lines of output, got {len(output)} and exit code "
            f"{process.returncode}: {message}; check that `java` runs"
        )
    return output
