"""Captioners: models that generate sentences about images, with the probability of each sentence.

A family is a provider of models, selected by the prefix of a model's address, such as `hf:`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from captionlib.models.families.model import Arrays, ImageModel, open_model

if TYPE_CHECKING:
    from captionlib.models.inference.captioning import GenerationConfig

__all__ = ["Caption", "CaptionModel", "GenerateCaptions", "SentenceScorer", "open_captioner"]


@dataclass(frozen=True)
class Caption:
    """One sentence of an n-best list.

    Attributes:
        text: the sentence.
        log_prob: ln p(sentence | image), the sum over all tokens, without length penalty or reranking.
        token_count: number of tokens that `log_prob` sums over, including an end token.
        attention: attention weights of each token, `[token_count, positions] float16`; None if they are not computed.
        image_text_score: cosine similarity of the embeddings of the sentence and the image from a ranker (dual
            encoder for image-text retrieval); None if it is not computed.
    """

    text: str
    log_prob: float
    token_count: int
    attention: npt.NDArray[np.float16] | None = None
    image_text_score: float | None = None


GenerateCaptions = Callable[[Arrays, Sequence[str]], list[list[Caption]]]
"""Function from images and their ids to the distinct captions of each image, best first.

The captions of an image do not depend on the other images of the batch.
"""


class CaptionModel(ImageModel, Protocol):
    """A captioner of any family; `open_captioner` loads it."""

    @property
    def attention_positions(self) -> int | None:
        """Number of positions that each token attends to, or None if the captioner has no attention maps."""

    @property
    def history(self) -> Sequence[Mapping[str, Any]]:
        """Metrics of each epoch of training; empty if they are unknown."""

    def describe_generation(self, config: "GenerationConfig") -> dict[str, Any]:
        """Returns the settings that, together with the model, determine the captions.

        Raises:
            CheckpointError: the captioner lacks a component that `config` needs, such as attention.
            ConfigError: the captioner does not support a setting.
        """

    def prepare(self, config: "GenerationConfig") -> GenerateCaptions:
        """Returns a function that generates captions for batches. Raises the same errors as `describe_generation`."""


@runtime_checkable
class SentenceScorer(Protocol):
    """A captioner that can compute the probability of references. Not all families implement this protocol."""

    def score_sentences(self, images: Arrays, sentences: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """Returns ln p(sentence | image) and the number of tokens of each sentence, as one list per image.

        The number of tokens includes the end token. Both values are 0 for a sentence without words.
        """


def open_captioner(address: str | os.PathLike[str], device: str = "cpu") -> CaptionModel:
    """Loads a captioner of any family.

    Args:
        address: folder of a checkpoint, or an address with the prefix of a family, such as `hf:FOLDER`.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        CheckpointError: the model is missing, damaged or of a different kind.
        ConfigError: the family or the device does not exist.
    """
    from captionlib.models.families.checkpoint_captioner import CheckpointCaptioner

    return open_model("captioners", address, device, CheckpointCaptioner)
