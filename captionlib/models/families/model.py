"""The interface that captioners and rankers (image-text retrieval models) of all families share.

A family is a provider of models, selected by the prefix of a model's address, such as `hf:`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy.typing as npt
import torch

from captionlib.data.images.decoding import Preprocessing, SizeLimit
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig, describe_preprocessing
from captionlib.models.families.registry import ModelKind, find_family, split_address

__all__ = ["Arrays", "ImageModel", "InputTransform", "describe_pixel_input", "open_model"]

Arrays = Sequence[npt.NDArray[Any]] | npt.NDArray[Any]
"""One array for each image: its features, or its pixels, `[height, width, 3] uint8`."""

InputTransform = EncoderConfig | Preprocessing | SizeLimit
"""How an image becomes the input of a model: through an encoder, or as pixels, resized to a fixed or a maximum size."""


class ImageModel(Protocol):
    """A model whose input is features of images, or the images themselves."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the model's output, such as its weights."""

    @property
    def encoder(self) -> Mapping[str, Any]:
        """`ImageEncoder.description` of the encoder of the features, or `describe_pixel_input` for pixels."""

    def find_input_transform(self, weights: str | None) -> InputTransform:
        """Returns the transform from images to the input of the model.

        `weights` is the path of the encoder's weights file. If it is None, the recorded path is used.

        Raises:
            ConfigError: the weights file is needed and cannot be found.
        """

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Checks that the model accepts the features of the encoder with this description.

        Raises:
            CheckpointError: the model was trained with a different encoder, or its input is pixels.
        """

    def to(self, device: torch.device) -> object:
        """Moves the model to a device."""


Model = TypeVar("Model", bound=ImageModel)


def open_model(
    kind: ModelKind, address: str | os.PathLike[str], device: str, load_checkpoint: Callable[[str], Model]
) -> Model:
    """Loads a model of a family, or with `load_checkpoint` if the address has no prefix; see `open_captioner`."""
    prefix, location = split_address(address)
    torch_device = resolve_device(device)
    load: Callable[[str], Model] = find_family(kind, prefix) if prefix else load_checkpoint
    model = load(location)
    model.to(torch_device)
    return model


def describe_pixel_input(preprocessing: Preprocessing | SizeLimit) -> dict[str, Any]:
    """Returns `ImageModel.encoder` for a model whose input is pixels."""
    return {"model": "pixels", "preprocessing": describe_preprocessing(preprocessing)}
