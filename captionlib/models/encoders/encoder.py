"""The encoder: any torchvision network, cut at any of its nodes, from pixels to feature vectors."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captionlib.data.images.decoding import Preprocessing
from captionlib.errors import ConfigError
from captionlib.models.devices import copy_to_host_async, halve_on_out_of_memory, resolve_device
from captionlib.models.encoders.network import EncoderNetwork, require_finite, truncate_network
from captionlib.models.encoders.weights import (
    choose_build_device,
    find_weights_transforms,
    hash_weights,
    is_weights_file,
    load_weights,
    read_preprocessing,
    sample_weights,
)
from captionlib.storage.folders import resolve_address

__all__ = [
    "Encoder",
    "EncoderConfig",
    "Encoding",
    "describe_finetuned_encoder",
    "load_encoder",
    "resolve_preprocessing",
]

Encoding = Callable[[], npt.NDArray[np.floating]]
"""Waits for the features of a batch that is being encoded, and gives them."""


@dataclass(frozen=True)
class EncoderConfig:
    """Which network, cut where, with which weights.

    Attributes:
        model: a torchvision model name, such as `vgg16` or `resnet50`.
        node: where it is cut: a node of its graph, or `fc6`/`fc7` of a VGG (after ReLU).
        weights: a torchvision weights name (downloaded and checked), a `.safetensors` or `.pth` file, or `random:SEED`.
        missing_weights: what to do about layers that the weights lack: `error`, or `random:SEED` to draw them.
        pooling: what becomes of a spatial map: kept whole (`none`), or its `mean` or `max` over positions.
        dtype: what the network computes in.
        resize_size: the shorter side before the crop in pixels; None as the weights were trained.
        stored_dtype: what features are rounded to, wherever they go, so that captions are the same from images and
            from stored features.
    """

    model: str = "vgg16"
    node: str = "fc7"
    weights: str = "IMAGENET1K_V1"
    missing_weights: str = "error"
    pooling: Literal["none", "mean", "max"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    resize_size: int | None = None
    stored_dtype: Literal["float16", "float32"] = "float16"

    @classmethod
    def from_description(cls, description: Mapping[str, Any], weights: str | None = None) -> "EncoderConfig":
        """Returns the configuration that produced an encoder's description.

        Args:
            description: the encoder's description, from a features dataset or a checkpoint.
            weights: path of the encoder's weights file. Required if the weights came from a file: a description
                records the content of the file, not its location.

        Raises:
            ConfigError: the weights came from a file and `weights` is None, or the features were imported.
        """
        if description["weights"] == "imported":
            raise ConfigError(
                "these features were imported, so the network that computed them is unknown and cannot encode more "
                "images; caption from features that were imported the same way"
            )
        if description["weights"] == "file" and weights is None:
            raise ConfigError(
                f"the encoder ({description['model']} at {description['node']}) was loaded from a weights file; "
                "give its path with --weights"
            )
        names = ("model", "node", "missing_weights", "pooling", "dtype", "stored_dtype")
        return cls(
            **{name: description[name] for name in names},
            weights=weights or description["weights"],
            resize_size=description["preprocessing"]["resize_size"],
        )

    def with_absolute_weights(self) -> "EncoderConfig":
        """Returns a copy that names a weights file by its absolute address, for processes in other folders."""
        return replace(self, weights=resolve_address(self.weights)) if is_weights_file(self.weights) else self


class Encoder:
    """A network that is ready to encode; made by `load_encoder`.

    Attributes:
        network: what it computes.
        description: all that its features depend on, the content of its weights included; goes into fingerprints.
        preprocessing: how an image becomes its input.
        shape: of the features of one image: `[size]`, or `[positions, channels]` of a map that is kept whole.
    """

    def __init__(
        self,
        network: EncoderNetwork,
        config: EncoderConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        weights_hash: str,
    ) -> None:
        self.network = network.to(device)
        self.preprocessing = preprocessing
        self.device = device
        crop = preprocessing.crop_size
        self.shape: list[int] = list(self.encode(np.zeros((1, crop, crop, 3), np.uint8)).shape[1:])
        self.description: dict[str, Any] = {
            "model": config.model,
            "node": config.node,
            "weights": _weights_label(config.weights),
            "missing_weights": config.missing_weights,
            "weights_sha256": weights_hash,
            "pooling": config.pooling,
            "dtype": config.dtype,
            "stored_dtype": config.stored_dtype,
            "preprocessing": {
                **asdict(preprocessing),
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
            },
            "shape": self.shape,
        }

    @property
    def size(self) -> int:
        """How many numbers the features of one image are."""
        return int(np.prod(self.shape))

    def encode(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.floating]:
        """Features of a batch, see `begin`."""
        return self.begin(images)()

    def begin(self, images: npt.NDArray[np.uint8]) -> Encoding:
        """Starts to encode a batch; one that does not fit into the device's memory is halved.

        A GPU computes on its own: who begins the next batch before asking for the features of this one keeps it busy.
        Copies and batches queue up in one stream; none waits for the host.

        Args:
            images: `[batch, crop, crop, 3] uint8`, RGB.

        Returns:
            What waits for the features and gives them: `[batch, size]` or `[batch, positions, channels]`, of the stored
            dtype.
        """
        parts = halve_on_out_of_memory(lambda part: self._begin(images[part]), len(images))
        return parts[0] if len(parts) == 1 else lambda: np.concatenate([finish() for finish in parts])

    @torch.inference_mode()
    def _begin(self, images: npt.NDArray[np.uint8]) -> Encoding:
        pixels = torch.from_numpy(images)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return partial(_finish, *copy_to_host_async(self.network.begin(pixels)))


def _finish(copied: Tensor, wait: Callable[[], None]) -> npt.NDArray[np.floating]:
    wait()
    require_finite(copied)
    features: npt.NDArray[np.floating] = copied.numpy()
    return features


def describe_finetuned_encoder(description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the description of an encoder becomes when its weights have been tuned.

    Args:
        description: as it was.
        weights: all that its network has, as a file of them will.
    """
    changed = {"weights": "file", "missing_weights": "error", "weights_sha256": hash_weights(weights)}
    return {**description, **changed}


def load_encoder(config: EncoderConfig, device: str = "auto", trainable: bool = False) -> Encoder:
    """Builds the network, cuts it and loads what it needs of the weights.

    Args:
        config: which network.
        device: auto, cpu, cuda or cuda:N.
        trainable: its weights are to be tuned, see `EncoderNetwork`.

    Raises:
        ConfigError: no such model, node, weights or device; or the weights lack layers that the node needs.
    """
    target = resolve_device(device)
    with choose_build_device(config.weights, config.missing_weights):
        network = truncate_network(config.model, config.node)
    needed = network.state_dict()
    weights = load_weights(config.model, config.weights, network)
    missing = sorted(set(needed) - set(weights))
    if missing and config.missing_weights == "error":
        raise ConfigError(
            f"weights {config.weights} lack {len(missing)} of the {len(needed)} tensors that {config.model} needs up "
            f"to {config.node}: {', '.join(missing)}; give a complete file, a node before them, "
            "or missing_weights: random:SEED"
        )
    if missing:
        weights = {**sample_weights(network, config.missing_weights), **weights}
    else:
        config = replace(config, missing_weights="error")  # none were drawn, so nothing depends on how
    _check_shapes(weights, needed, config)
    network.to_empty(device="cpu").load_state_dict(weights)
    preprocessing = resolve_preprocessing(config.model, config.weights, config.resize_size)
    dtype, stored_dtype = getattr(torch, config.dtype), getattr(torch, config.stored_dtype)
    module = EncoderNetwork(network, preprocessing, config.pooling, dtype, stored_dtype, trainable)
    return Encoder(module, config, preprocessing, target, hash_weights(weights))


def resolve_preprocessing(model: str, weights: str, resize_size: int | None = None) -> Preprocessing:
    """How images become a model's input; `resize_size` takes the place of the weights' own."""
    saved = read_preprocessing(weights)
    if saved is not None:
        return replace(saved, resize_size=resize_size or saved.resize_size)
    preset = find_weights_transforms(model, weights)
    return Preprocessing(
        resize_size=resize_size or preset.resize_size[0],
        crop_size=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _check_shapes(weights: Mapping[str, Tensor], needed: Mapping[str, Tensor], config: EncoderConfig) -> None:
    for name, tensor in needed.items():
        if weights[name].shape != tensor.shape:
            raise ConfigError(
                f"weights {config.weights}: {name} is {list(weights[name].shape)}, {config.model} expects "
                f"{list(tensor.shape)}; these weights are of another network"
            )


def _weights_label(weights: str) -> str:
    """The weights' name; a file counts by its content, wherever it lies."""
    return "file" if is_weights_file(weights) else weights
