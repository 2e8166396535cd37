"""METEOR's alignments of captions with references: its own Java program's, out of pycocoevalcap."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pycocoevalcap.meteor import meteor

from captionlib.errors import SubprocessError
from captionlib.evaluation.java import run_java

__all__ = ["count_alignments"]

_JAR = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
_STATISTICS = 23
_SEPARATOR = "|||"


def count_alignments(sentences: Sequence[tuple[str, Sequence[str]]]) -> npt.NDArray[np.float64]:
    """The counts that METEOR is computed from, of each caption with the reference that it matches best.

    The words, the function words among them, the matches of each of four kinds (the content words of caption and
    reference, then the function words of both), the chunks that the matches form, and the words matched: 23 numbers
    that may be added up over captions. A caption that is its reference has no chunks, as it has no fragments.

    pycocoevalcap's own wrapper waits for ever when Java fails, and reads text in the encoding of the locale.

    Args:
        sentences: captions with their references, tokens with a space between them.

    Returns:
        `[captions, 23]`.

    Raises:
        ConfigError: Java is not installed.
        SubprocessError: it fails.
    """
    lines = [
        f" {_SEPARATOR} ".join(["SCORE", *(_plain(reference) for reference in references), _plain(caption)])
        for caption, references in sentences
    ]
    options = ["-Xmx2G", "-jar", _JAR.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    answers = run_java("METEOR score", options, lines, folder=_JAR.parent)
    try:
        counts = np.array([line.split() for line in answers], np.float64).reshape(len(lines), _STATISTICS)
    except ValueError as error:
        raise SubprocessError(
            f"METEOR answered {answers[0]!r:.200}, expected {_STATISTICS} numbers a caption"
        ) from error
    lengths, chunks, matched = counts[:, 0:2], counts[:, 20], counts[:, 21:23]
    counts[(lengths == matched).all(1) & (chunks == 1), 20] = 0
    return counts


def _plain(text: str) -> str:
    """Without what separates sentences in METEOR's lines."""
    return " ".join(token for token in text.split(" ") if _SEPARATOR not in token)
