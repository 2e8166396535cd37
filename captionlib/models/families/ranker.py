"""Rankers: dual encoders that embed images and sentences as unit vectors, close together if they match.

A family is a provider of models, selected by the prefix of a model's address, such as `hf:`.
"""

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from captionlib.models.checkpoints.checkpoint import load_ranker
from captionlib.models.families.model import Arrays, ImageModel, open_model

__all__ = ["RankingModel", "open_ranker"]


class RankingModel(ImageModel, Protocol):
    """A ranker of any family; `open_ranker` loads it."""

    @property
    def size(self) -> int:
        """Number of dimensions of the joint embedding space."""

    @property
    def sentence_template(self) -> str | None:
        """Text into which every sentence is inserted at `{}` before it is embedded, or None."""

    def has_known_word(self, sentence: str) -> bool:
        """Returns whether the model knows at least one word of the sentence."""

    def encode_images(self, images: Arrays) -> npt.NDArray[np.float32]:
        """Embeds images as unit vectors, `[images, size]`."""

    def encode_sentences(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embeds sentences as unit vectors, `[sentences, size]`."""


def open_ranker(address: str | os.PathLike[str], device: str = "cpu") -> RankingModel:
    """Loads a ranker of any family; see `open_captioner` for the arguments and errors."""
    return open_model("rankers", address, device, load_ranker)
