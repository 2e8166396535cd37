"""What an index needs of a ranker, whichever it is."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captionlib.errors import QueryError

__all__ = ["SentenceEncoder", "load_encoder", "rank_sentences"]

_SENTENCES = pa.schema([("sentence", pa.string()), ("score", pa.float32())])


class SentenceEncoder(Protocol):
    """Puts sentences and images into the space that the vectors of an index lie in."""

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint; the embeddings that it made carry the same."""

    @property
    def encoder(self) -> Mapping[str, Any]:
        """The description of the image encoder whose features it takes."""

    def has_known_word(self, sentence: str) -> bool:
        """Whether it has learned any of the words; the vector of a sentence of others says nothing."""

    def encode_sentences(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors of sentences, `[sentences, size]`."""

    def encode_features(self, features: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Unit vectors of images, `[images, size]`, from their features."""


def load_encoder(folder: str | os.PathLike[str], device: str = "cpu") -> SentenceEncoder:
    """Loads a ranker's checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from captionlib.models.checkpoints.checkpoint import load_ranker  # loads torch, which takes seconds

    return load_ranker(folder, device)


def rank_sentences(ranker: SentenceEncoder, vector: npt.NDArray[np.float32], sentences: Sequence[str]) -> pa.Table:
    """Sentences by how near they are to a vector, the nearest first: sentence and score.

    Args:
        ranker: of the same space.
        vector: `[size]`, of unit length.
        sentences: what to compare it with.

    Raises:
        QueryError: there are none.
    """
    if not sentences:
        raise QueryError("sentences: expected one a line, got none")
    scores = ranker.encode_sentences(sentences) @ vector
    order = np.argsort(-scores, kind="stable")
    return pa.Table.from_pydict(
        {"sentence": [sentences[place] for place in order], "score": scores[order].astype(np.float32)}, _SENTENCES
    )
