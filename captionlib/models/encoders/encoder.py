"""Encoders, which compute features of images with PyTorch networks. `load_encoder` loads those of torchvision."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from captionlib.config import configclass
from captionlib.data.images.decoding import DecodeScale, Preprocessing, SizeLimit
from captionlib.errors import ConfigError
from captionlib.models.checkpoints.encoder_file import LOCAL_WEIGHTS
from captionlib.models.devices import copy_to_host_async, halve_on_out_of_memory, resolve_device
from captionlib.models.encoders.network import EncoderNetwork, require_finite, truncate_network
from captionlib.models.encoders.weights import (
    choose_build_device,
    hash_weights,
    is_weights_file,
    load_weights,
    resolve_preprocessing,
    sample_weights,
    serialize_weights,
)
from captionlib.models.families.registry import resolve_model_address, split_address
from captionlib.storage.folders import resolve_address

__all__ = [
    "Encoder",
    "EncoderConfig",
    "PendingFeatures",
    "Pixels",
    "describe_finetuned_encoder",
    "describe_preprocessing",
    "load_encoder",
    "load_network_weights",
    "pack_encoder_weights",
]

PendingFeatures = Callable[[], npt.NDArray[np.floating]]
"""Function that waits for the features of a batch and returns them."""

Pixels = Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]
"""Images of the same size, `[batch, height, width, 3]`, RGB."""


@configclass
class EncoderConfig:
    """A network, the node at which it is truncated, and its weights.

    Attributes:
        model: a torchvision model name, such as `vgg16` or `resnet50`, or a model of another family (provider of
            models): `hf:FOLDER` or `timm:NAME`.
        node: node of the model's graph whose output is the features. `fc6` and `fc7` of a VGG are taken after the ReLU.
            Models of other families have the nodes `pooled`, `class_token` and `feature_map`.
        weights: a torchvision weights name, a `.safetensors`, `.pth` or `.pt` file, or `random:SEED`. The folder of an
            `hf:` model contains its weights.
        missing_weights: what to do if `weights` lack layers: `error`, or `random:SEED` to sample them.
        pooling: `none` keeps a spatial feature map whole; `mean` and `max` reduce it over positions.
        dtype: dtype of the computation.
        resize_size: shorter side of the image before the crop, in pixels. If None, the size depends on the
            weights.
        stored_dtype: dtype that features are rounded to, even if they are not stored, so that an image and its
            stored features give the same caption.
        decode_scale: `fast` decodes large JPEG files at a reduced scale, which changes the features slightly; `exact`
            decodes them at full resolution. If None, the scale that the network was trained with, or `exact` if
            that is unknown.
    """

    model: str = "vgg16"
    node: str = "fc7"
    weights: str = "IMAGENET1K_V1"
    missing_weights: str = "error"
    pooling: Literal["none", "mean", "max"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    resize_size: PositiveInt | None = None
    stored_dtype: Literal["float16", "float32"] = "float16"
    decode_scale: DecodeScale | None = None

    @classmethod
    def from_description(cls, description: Mapping[str, Any], weights: str | None = None) -> "EncoderConfig":
        """Reconstructs the configuration of an encoder from its description.

        `weights` is the path of the encoder's weights file or model folder, required if its weights came from one.

        Raises:
            ConfigError: the weights came from a file or folder and `weights` is None, or the features were imported.
        """
        if description["weights"] == "imported":  # written by `captionlib import-features`
            raise ConfigError(
                "the features were imported, so the network that computed them is unknown and cannot encode more "
                "images; import the features of these images too"
            )
        if description["weights"] in LOCAL_WEIGHTS and weights is None:
            kind = "weights file" if description["weights"] == "file" else "model folder"
            raise ConfigError(
                f"the encoder ({description['model']} at {description['node']}) was loaded from a {kind}; "
                "specify its path with --weights"
            )
        model, source = description["model"], weights or description["weights"]
        if description["weights"] in ("folder", "hub"):  # the weights are part of the model
            model = model if weights is None else f"{split_address(model)[0]}:{weights}"
            source = cls.weights  # the default has no effect for such models
        names = ("node", "missing_weights", "pooling", "dtype", "stored_dtype")
        return cls(
            model=model,
            **{name: description[name] for name in names},
            weights=source,
            resize_size=description["preprocessing"]["resize_size"],
            decode_scale=description["preprocessing"].get("decode_scale", "exact"),
        )

    def find_weights_location(self) -> str:
        """Returns the path or URL of the weights file or of the local model folder; empty if there is none."""
        if is_weights_file(self.weights):
            return self.weights
        prefix, location = split_address(self.model)
        return location if prefix and self.weights == EncoderConfig.weights and Path(location).is_dir() else ""

    def override_preprocessing(self, preprocessing: Preprocessing) -> Preprocessing:
        """Returns `preprocessing` with the configured `resize_size` and `decode_scale`."""
        return replace(
            preprocessing,
            resize_size=self.resize_size or preprocessing.resize_size,
            decode_scale=self.decode_scale or preprocessing.decode_scale,
        )

    def resolve_paths(self) -> "EncoderConfig":
        """Returns a copy in which local paths are absolute, for workers with different working directories."""
        if is_weights_file(self.weights):
            return replace(self, weights=resolve_address(self.weights))
        if split_address(self.model)[0] and self.weights == EncoderConfig.weights:  # such as `hf:FOLDER`
            return replace(self, model=resolve_model_address(self.model))
        return self


class Encoder:
    """Computes features with a PyTorch network that has its weights. Implements the protocol `ImageEncoder`.

    Args:
        network: module that maps normalized pixels, `[batch, 3, crop, crop]`, to a dictionary with the key `features`:
            `[batch, size]` or `[batch, channels, height, width]`.
        config: becomes part of the encoder's description.
        preprocessing: how to convert an image to pixels. `config` overrides its `resize_size` and `decode_scale`.
        device: device that the network is moved to.
        weights_hash: hash of everything that determines the network's output and is not part of `config`.
        trainable: see `EncoderNetwork`.
    """

    def __init__(
        self,
        network: nn.Module,
        config: EncoderConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        weights_hash: str,
        trainable: bool = False,
    ) -> None:
        self.preprocessing = config.override_preprocessing(preprocessing)
        self.device = device
        dtype, stored_dtype = getattr(torch, config.dtype), getattr(torch, config.stored_dtype)
        encoder_network = EncoderNetwork(network, preprocessing, config.pooling, dtype, stored_dtype, trainable)
        self.network = encoder_network.to(device)
        crop = preprocessing.crop_size
        self.shape: list[int] = list(self.encode(np.zeros((1, crop, crop, 3), np.uint8)).shape[1:])
        self.description: dict[str, Any] = {
            "model": config.model,
            "node": config.node,
            # A file is identified by the hash of its weights, not by its location.
            "weights": "file" if is_weights_file(config.weights) else config.weights,
            "missing_weights": config.missing_weights,
            "weights_sha256": weights_hash,
            "pooling": config.pooling,
            "dtype": config.dtype,
            "stored_dtype": config.stored_dtype,
            "preprocessing": describe_preprocessing(self.preprocessing),
            "shape": self.shape,
        }

    def encode(self, images: Pixels) -> npt.NDArray[np.floating]:
        return self.encode_async(images)()

    def encode_async(self, images: Pixels) -> PendingFeatures:
        """Starts encoding a batch; see `ImageEncoder`. Batches that exceed the memory of the device are halved.

        To keep a GPU busy, start the next batch before waiting for the features of the current one.
        """
        pixels = np.asarray(images)
        parts = halve_on_out_of_memory(lambda part: self._start_batch(pixels[part]), len(pixels))
        return parts[0] if len(parts) == 1 else lambda: np.concatenate([wait() for wait in parts])

    @torch.inference_mode()
    def _start_batch(self, images: npt.NDArray[np.uint8]) -> PendingFeatures:
        pixels = torch.from_numpy(images)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return partial(_wait_for_batch, *copy_to_host_async(self.network.encode_unchecked(pixels)))


def _wait_for_batch(features: Tensor, wait: Callable[[], None]) -> npt.NDArray[np.floating]:
    wait()
    require_finite(features)
    array: npt.NDArray[np.floating] = features.numpy()
    return array


def load_encoder(config: EncoderConfig, device: str = "auto", trainable: bool = False) -> Encoder:
    """Builds an encoder and loads its weights; `trainable` prepares them for fine-tuning (see `EncoderNetwork`).

    Raises:
        ConfigError: the model, the node, the weights or the device does not exist, or the weights lack a layer that
            the node needs.
    """
    torch_device = resolve_device(device)
    with choose_build_device(config.weights, config.missing_weights):
        network = truncate_network(config.model, config.node)
    weights, config = load_network_weights(network, config)
    network.load_state_dict(weights, assign=True)
    preprocessing = resolve_preprocessing(config.model, config.weights)
    return Encoder(network, config, preprocessing, torch_device, hash_weights(weights), trainable)


def load_network_weights(network: nn.Module, config: EncoderConfig) -> tuple[dict[str, Tensor], EncoderConfig]:
    """Loads or samples the weights that a network needs.

    Returns:
        The weights, and the configuration, in which `missing_weights` is `error` if no weights were sampled.

    Raises:
        ConfigError: the weights do not exist, lack layers or have different shapes.
    """
    needed = network.state_dict()
    weights = load_weights(config.model, config.weights, network)
    missing = sorted(set(needed) - set(weights))
    if missing and config.missing_weights == "error":
        raise ConfigError(
            f"weights {config.weights} lack {len(missing)} of the {len(needed)} tensors that {config.model} needs up "
            f"to {config.node}: {', '.join(missing)}; use a complete file, choose an earlier node, or set "
            "missing_weights to random:SEED"
        )
    if missing:
        weights = {**sample_weights(network, config.missing_weights), **weights}
    else:
        config = replace(config, missing_weights="error")  # no weights were sampled
    for name, tensor in needed.items():
        if weights[name].shape != tensor.shape:
            raise ConfigError(
                f"weights {config.weights}: {name} has shape {list(weights[name].shape)}, but "
                f"{config.model} expects {list(tensor.shape)}; these weights are for a different network"
            )
    return weights, config


def describe_finetuned_encoder(description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns an encoder's description, updated after fine-tuning.

    `weights` must contain all tensors of the encoder, including those that were not trained.
    """
    changes = {"weights": "file", "missing_weights": "error", "weights_sha256": hash_weights(weights)}
    return {**description, **changes}


def pack_encoder_weights(config: EncoderConfig) -> bytes:
    """Packs the tensors that an encoder needs, and its preprocessing, into the content of a safetensors file.

    The encoder must be a torchvision network with weights from a file. Tensors are stored in float16 if that changes
    no value.

    Raises:
        ConfigError: the file cannot be read.
    """
    with torch.device("meta"):  # only the names matter
        network = truncate_network(config.model, config.node)
    tensors = load_weights(config.model, config.weights, network)
    halves = {name: tensor.half() for name, tensor in tensors.items() if tensor.is_floating_point()}
    exact = {name: half for name, half in halves.items() if torch.equal(half.float(), tensors[name])}
    preprocessing = config.override_preprocessing(resolve_preprocessing(config.model, config.weights))
    return serialize_weights({**tensors, **exact}, preprocessing)


def describe_preprocessing(preprocessing: Preprocessing | SizeLimit) -> dict[str, Any]:
    """Returns a preprocessing, or the maximum size of decoded images, as JSON values for fingerprints."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(preprocessing).items()}
    for name, default in (("decode_scale", "exact"), ("stretch", False)):
        if values.get(name) == default:  # omitted, so that the fingerprints of older datasets remain valid
            del values[name]
    return values
