"""What captioners and rankers of all families have in common."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy.typing as npt
import torch

from captionlib.data.images.decoding import Preprocessing, Shrinking
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig, describe_preprocessing
from captionlib.models.families.registry import Group, find_family, split_address

__all__ = ["Arrays", "ImageModel", "ImageSource", "describe_pixels", "open_model"]

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
        """`ImageEncoder.description` of the encoder whose features are the input, or `describe_pixels`."""

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


Model = TypeVar("Model", bound=ImageModel)


def open_model(
    group: Group, address: str | os.PathLike[str], device: str, load_checkpoint: Callable[[str], Model]
) -> Model:
    """Loads a model of any family, or a checkpoint with `load_checkpoint`; see `open_captioner`."""
    prefix, location = split_address(address)
    target = resolve_device(device)
    load: Callable[[str], Model] = find_family(group, prefix) if prefix else load_checkpoint
    model = load(location)
    model.to(target)
    return model


def describe_pixels(preprocessing: Preprocessing | Shrinking) -> dict[str, Any]:
    """Returns `ImageModel.encoder` for a model whose input is pixels."""
    return {"model": "pixels", "preprocessing": describe_preprocessing(preprocessing)}
