"""The encoder: any torchvision network, cut at any of its nodes, from pixels to feature vectors."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from captionlib.data.images import Preprocessing
from captionlib.errors import ConfigError
from captionlib.models.devices import copy_to_host, in_parts, resolve_device
from captionlib.models.weights import hash_weights, load_weights, random_weights, weights_preset

__all__ = [
    "Encoder",
    "EncoderConfig",
    "Encoding",
    "build_network",
    "encoder_config",
    "load_encoder",
    "preprocessing_of",
]

Encoding = Callable[[], npt.NDArray[np.floating]]
"""Waits for the features of a batch that is being encoded, and gives them."""

# The talk's names for VGG's layers, and the nodes that follow their ReLU.
_VGG_ALIASES = {"fc6": "classifier.1", "fc7": "classifier.4"}


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


class Encoder:
    """A network that is ready to encode; made by `load_encoder`.

    Attributes:
        description: all that its features depend on, the content of its weights included; goes into fingerprints.
        preprocessing: how an image becomes its input.
        shape: of the features of one image: `[size]`, or `[positions, channels]` of a map that is kept whole.
    """

    def __init__(
        self,
        network: nn.Module,
        config: EncoderConfig,
        preprocessing: Preprocessing,
        device: torch.device,
        weights_hash: str,
    ) -> None:
        self.preprocessing = preprocessing
        self.device = device
        self._pooling = config.pooling
        self._stored_dtype = np.dtype(config.stored_dtype)
        self._dtype = getattr(torch, config.dtype)
        self._network = network.to(device=device, dtype=self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        self._scale, self._shift = 1 / (255 * std), mean / std
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
        try:
            return self._begin(images)
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        features = np.concatenate(in_parts(lambda part: self._begin(images[part])(), len(images)))
        return lambda: features

    @torch.inference_mode()
    def _begin(self, images: npt.NDArray[np.uint8]) -> Encoding:
        pixels = torch.from_numpy(images)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        pixels = pixels.permute(0, 3, 1, 2)  # a view: channels_last is how decoded images lie in memory
        output: Tensor = self._network((pixels * self._scale - self._shift).to(self._dtype))["features"]
        return partial(self._finish, *copy_to_host(self._pool(output.float())))

    def _finish(self, copied: Tensor, wait: Callable[[], None]) -> npt.NDArray[np.floating]:
        wait()
        with np.errstate(over="ignore"):  # found below
            features = copied.numpy().astype(self._stored_dtype)
        if not np.isfinite(features).all():
            raise ConfigError(
                f"the encoder's features do not fit into {self._stored_dtype}, or are not numbers; "
                "set encoder.stored_dtype to float32, or check the weights"
            )
        return features

    def _pool(self, output: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to `[batch, channels]` or `[batch, positions, channels]`."""
        if output.dim() != 4:
            return output.flatten(1)
        if self._pooling == "mean":
            return output.mean((2, 3))
        if self._pooling == "max":
            return output.amax((2, 3))
        return (
            output.flatten(2).transpose(1, 2).contiguous()
            if output.shape[2] * output.shape[3] > 1
            else output.flatten(1)
        )


def encoder_config(description: Mapping[str, Any], weights: str | None = None) -> EncoderConfig:
    """The configuration that an encoder's description came from.

    Args:
        description: what a features dataset or a checkpoint says of its encoder.
        weights: where the weights are, if they came from a file: a description knows its content, not its place.

    Raises:
        ConfigError: the weights are a file, and no place was given; or the features were imported.
    """
    if description["weights"] == "imported":
        raise ConfigError(
            "the features were imported, so the network that made them is not known well enough to make more; "
            "caption from features that were imported alike"
        )
    if description["weights"] == "file" and weights is None:
        raise ConfigError(
            f"the encoder ({description['model']} at {description['node']}) had its weights from a file; "
            "give its path with --weights"
        )
    names = ("model", "node", "missing_weights", "pooling", "dtype", "stored_dtype")
    resize_size = description["preprocessing"]["resize_size"]
    return EncoderConfig(
        **{name: description[name] for name in names},
        weights=weights or description["weights"],
        resize_size=resize_size,
    )


def load_encoder(config: EncoderConfig, device: str = "auto") -> Encoder:
    """Builds the network, cuts it and loads what it needs of the weights.

    Raises:
        ConfigError: no such model, node, weights or device; or the weights lack layers that the node needs.
    """
    target = resolve_device(device)
    model = build_network(config.model)
    network = _cut(model, config)
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
        weights = {**random_weights(network, config.missing_weights), **weights}
    _check_shapes(weights, needed, config)
    network.load_state_dict(weights)
    preprocessing = preprocessing_of(config.model, config.weights, config.resize_size)
    return Encoder(network.eval(), config, preprocessing, target, hash_weights(weights))


def build_network(name: str) -> nn.Module:
    """A torchvision model without learned weights, in evaluation mode.

    Raises:
        ConfigError: there is no such model.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = difflib.get_close_matches(name, names) or names[:5]
        raise ConfigError(f"unknown model {name!r}; torchvision has {', '.join(close)} and {len(names)} in all")
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model.eval()


def _cut(model: nn.Module, config: EncoderConfig) -> nn.Module:
    node = _VGG_ALIASES.get(config.node, config.node) if config.model.startswith("vgg") else config.node
    _, nodes = get_graph_node_names(model)
    if node not in nodes:
        close = difflib.get_close_matches(node, nodes, n=5) or nodes[-5:]
        raise ConfigError(f"{config.model} has no node {config.node!r}; near it: {', '.join(close)}")
    extractor: nn.Module = create_feature_extractor(model, {node: "features"})
    return extractor


def preprocessing_of(model: str, weights: str, resize_size: int | None = None) -> Preprocessing:
    """How images become a model's input; `resize_size` takes the place of the weights' own."""
    preset = weights_preset(model, weights)
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
    return "file" if weights.endswith((".safetensors", ".pth", ".pt")) else weights
