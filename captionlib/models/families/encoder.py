"""Image encoders: models that compute the image features that captioners and rankers (retrieval models) use.

A family is a provider of models, selected by the prefix of a model's address, such as `timm:`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from captionlib.data.images.decoding import Preprocessing
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import EncoderConfig, PendingFeatures, Pixels, load_encoder
from captionlib.models.families.registry import find_family, split_address

__all__ = ["ImageEncoder", "LoadEncoder", "open_encoder"]


class ImageEncoder(Protocol):
    """An image encoder of any family. `open_encoder` loads one; `Encoder` turns a PyTorch module into one."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How to convert an image to input pixels."""

    @property
    def shape(self) -> list[int]:
        """Shape of the features of one image: `[size]`, or `[positions, channels]` for a feature map."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Everything that determines the features, as JSON values; see `EncoderConfig.from_description`."""

    def encode_async(self, images: Pixels) -> PendingFeatures:
        """Starts encoding images, `[batch, crop, crop, 3] uint8`. Their features must not depend on the batch.

        Returns:
            A function that waits for the features and returns them: `[batch, *shape]`, with the dtype
            `EncoderConfig.stored_dtype`. It raises DatasetError if they overflow that dtype.
        """


LoadEncoder = Callable[[str, EncoderConfig, torch.device], ImageEncoder]
"""Function that loads an encoder of a family from the model's location (its address without the prefix)."""


def open_encoder(config: EncoderConfig, device: str = "auto") -> ImageEncoder:
    """Loads an encoder of any family.

    Args:
        config: the prefix of `config.model` names the family; torchvision models have none.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        CheckpointError: the model is damaged or of a different kind.
        ConfigError: the family, model, node (layer whose output is used), weights or device does not exist.
    """
    prefix, location = split_address(config.model)
    if not prefix:
        return load_encoder(config, device)
    load: LoadEncoder = find_family("encoders", prefix)
    return load(location, config, resolve_device(device))
