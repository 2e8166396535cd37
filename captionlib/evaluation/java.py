"""Runs the two Java programs behind the standard caption metrics: Stanford's PTB tokenizer and METEOR 1.5.

Both ship with pycocoevalcap. Its own wrappers read text in the encoding of the locale, do not notice when Java fails
(METEOR's waits forever) or take a line break within a sentence for the start of the next one, so Java is run here.
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
_METEOR_STATISTICS = 23
_METEOR_SEPARATOR = "|||"


def has_java() -> bool:
    """Returns whether `java` is on the PATH."""
    return shutil.which("java") is not None


def tokenize_ptb(sentences: Sequence[str]) -> list[str]:
    """Tokenizes sentences as pycocoevalcap does: lower case, no punctuation, a space between tokens."""
    if not sentences:
        return []
    arguments = ["-cp", str(_TOKENIZER_JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = _run_java("PTB tokenizer", arguments, [" ".join(sentence.splitlines()) for sentence in sentences])
    return [" ".join(token for token in line.rstrip().split(" ") if token not in _PUNCTUATION) for line in lines]


def count_alignments(pairs: Sequence[tuple[str, Sequence[str]]]) -> npt.NDArray[np.float64]:
    """Returns the counts that METEOR is computed from, for each caption and the reference that it matches best.

    The 23 counts add up over captions. They are the words of caption and reference (2), their function words (2), the
    matches of each of four kinds as content words of the caption, of the reference, function words of the caption, of
    the reference (4 x 4), the chunks of adjacent matches (1), and the matched words of caption and reference (2). A
    caption that equals its reference counts no chunk, since it has no fragmentation.

    Args:
        pairs: captions with their references, tokenized, with a space between tokens.

    Returns:
        `[captions, 23] float64`.
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
    """Runs a program that prints one line for each input line, and returns its lines.

    Raises:
        ConfigError: Java is not installed.
        SubprocessError: the program fails.
    """
    if not has_java():
        raise ConfigError(
            f"the {program} needs Java, and `java` is not on the PATH; install a Java runtime (version 8 or later)"
        )
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments]
    text = "".join(f"{line}\n" for line in lines)
    process = subprocess.run(command, input=text.encode(), capture_output=True, check=False, cwd=folder)
    output = process.stdout.decode(errors="replace").removesuffix("\n").split("\n")
    if process.returncode != 0 or len(output) != len(lines):
        # Java reports its own errors on either stream.
        message = (process.stderr + process.stdout[-500:]).decode(errors="replace").strip()[-500:]
        raise SubprocessError(
            f"the {program} failed: expected {len(lines)} lines of output, got {len(output)} and exit code "
            f"{process.returncode}: {message}; check that `java` runs"
        )
    return output
