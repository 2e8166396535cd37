"""What captioners and rankers of all families have in common."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch

from captionlib.data.images.decoding import Preprocessing, Shrinking
from captionlib.models.encoders.encoder import EncoderConfig, describe_preprocessing

__all__ = ["Arrays", "ImageModel", "ImageSource", "describe_pixels"]

Arrays = Sequence[npt.NDArray[Any]] | npt.NDArray[Any]
"""One array for each image: its features, or its pixels, `[height, width, 3] uint8`."""

ImageSource = EncoderConfig | Preprocessing | Shrinking
"""How an image becomes the input of a model: through an encoder, or as pixels."""


class ImageModel(Protocol):
    """A model whose input is features of images, or the images themselves."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the model's output, such as its weights."""

    @property
    def encoder(self) -> Mapping[str, Any]:
        """`Encoder.description` of the encoder whose features are the input, or `describe_pixels`."""

    def find_source(self, weights: str | None) -> ImageSource:
        """Returns how images become the input.

        `weights` is the path of the encoder's weights file, if the user specified it.

        Raises:
            ConfigError: the weights file is needed and cannot be found.
        """

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Checks that the features of an encoder with this description are the model's input.

        Raises:
            CheckpointError: they are not.
        """

    def to(self, device: torch.device) -> object:
        """Moves the model to a device."""


def describe_pixels(preprocessing: Preprocessing | Shrinking) -> dict[str, Any]:
    """Returns `ImageModel.encoder` for a model whose input is pixels."""
    return {"model": "pixels", "preprocessing": describe_preprocessing(preprocessing)}
