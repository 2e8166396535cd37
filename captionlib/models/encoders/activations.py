"""Computes the activations of a network's convolutional layers and the class probabilities for one image."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from pydantic import PositiveInt
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from captionlib.config import configclass
from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.data.images.fetching import ImageFetcher
from captionlib.errors import ConfigError
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.network import build_network
from captionlib.models.encoders.weights import load_weights, resolve_preprocessing

__all__ = ["ActivationConfig", "Activations", "LayerActivations", "compute_activations", "find_convolutions"]

_REPORTED_CLASSES = 10
_REUSE_SUFFIX = re.compile(r"_\d+$")  # suffix of a node that reuses the module of an earlier node
_AFTER_CONVOLUTION = nn.BatchNorm2d | nn.ReLU | nn.ReLU6 | nn.SiLU | nn.Hardswish | nn.GELU
_RELU = re.compile(r"(?:^|\.)relu\d*$")  # name of a node that calls the function relu instead of a module


@configclass
class ActivationConfig:
    """A network and the layers to show.

    Attributes:
        model: a torchvision model name, such as `vgg16` or `resnet50`.
        weights: a torchvision weights name, a `.safetensors`, `.pth` or `.pt` file, or `random:SEED`.
        nodes: nodes of the model's graph whose outputs are feature maps. If empty, all convolutional layers are used,
            with the batch normalization and the activation function that follow them.
        max_layers: maximum number of convolutional layers; if there are more, evenly spaced ones are selected.
        resize_size: shorter side of the image before the crop, in pixels. If None, the size depends on the weights.
    """

    model: str = "vgg16"
    weights: str = "IMAGENET1K_V1"
    nodes: tuple[str, ...] = ()
    max_layers: PositiveInt = 16
    resize_size: PositiveInt | None = None


@dataclass(frozen=True)
class LayerActivations:
    """The activations of one layer."""

    node: str
    maps: npt.NDArray[np.float32]  # [channels, height, width]


@dataclass(frozen=True)
class Activations:
    """The activations of a network for one image."""

    image: npt.NDArray[np.uint8]  # the network's input before normalization, [height, width, 3]
    layers: Sequence[LayerActivations]  # in the order of the network
    classes: Sequence[tuple[str, float]]  # names and probabilities, most probable first
    note: str  # reason why `classes` is empty; otherwise an empty string


def compute_activations(uri: str | os.PathLike[str], config: ActivationConfig, device: str = "auto") -> Activations:
    """Runs a network on an image and returns the activations of its layers and the class probabilities.

    Raises:
        ConfigError: the model, the weights, a node or the device does not exist, or a node outputs no feature map.
        FetchError: the image cannot be fetched.
        DecodeError: the image cannot be decoded.
    """
    torch_device = resolve_device(device)
    network, logits_node, note = _load_network(config)
    preprocessing = resolve_preprocessing(config.model, config.weights)
    preprocessing = replace(preprocessing, resize_size=config.resize_size or preprocessing.resize_size)
    with ImageFetcher() as fetcher:
        image = decode_image(fetcher.fetch(os.fspath(uri)), preprocessing).pixels
    with torch.inference_mode():
        outputs: Mapping[str, Tensor] = network.to(torch_device)(_normalize(image, preprocessing).to(torch_device))
    layers = []
    for node, output in outputs.items():
        if node == logits_node and node not in config.nodes:
            continue
        if output.dim() != 4:
            raise ConfigError(f"{config.model}: expected feature maps, got {node} with shape {list(output.shape)}")
        layers.append(LayerActivations(node, output[0].float().cpu().numpy()))
    classes = _rank_classes(outputs[logits_node], config) if logits_node else []
    return Activations(image, layers, classes, note)


def find_convolutions(model: nn.Module) -> list[str]:
    """Returns one node per convolution: the last node of its block of convolution, normalization and activation."""
    modules = dict(model.named_modules())
    _, nodes = get_graph_node_names(model)
    ends = []
    for start, node in enumerate(nodes):
        if not isinstance(modules.get(_REUSE_SUFFIX.sub("", node)), nn.Conv2d):
            continue
        end = start
        while end + 1 < len(nodes) and _belongs_to_convolution(nodes[end + 1], modules):
            end += 1
        ends.append(nodes[end])
    return ends


def _belongs_to_convolution(node: str, modules: Mapping[str, nn.Module]) -> bool:
    name = _REUSE_SUFFIX.sub("", node)
    return isinstance(modules.get(name), _AFTER_CONVOLUTION) or bool(_RELU.search(name))


def _load_network(config: ActivationConfig) -> tuple[nn.Module, str, str]:
    """Returns the network, the node of its logits, and an empty note; or an empty node, and a note with the reason."""
    model = build_network(config.model)
    nodes, logits_node = _choose_nodes(model, config)
    network: nn.Module = create_feature_extractor(model, list(dict.fromkeys([*nodes, logits_node])))
    weights = load_weights(config.model, config.weights, network)
    missing = sorted(set(network.state_dict()) - set(weights))
    note = ""
    if config.weights.startswith("random:"):
        note = "The weights are random, so the network cannot classify the image."
    elif missing:
        note = f"The weights have no classifier: {missing[0]} and {len(missing) - 1} more tensors are missing."
    if note:
        logits_node, network = "", create_feature_extractor(model, nodes)
    while not config.nodes and len(nodes) > 1 and set(network.state_dict()) - set(weights):
        nodes = nodes[:-1]  # the last convolutions may be part of the classifier
        network = create_feature_extractor(model, nodes)
    _assign_weights(network, weights, config)
    return network.eval(), logits_node, note


def _choose_nodes(model: nn.Module, config: ActivationConfig) -> tuple[list[str], str]:
    """Returns the nodes to show and the node of the logits."""
    _, names = get_graph_node_names(model)
    if unknown := [node for node in config.nodes if node not in names]:
        raise ConfigError(
            f"{config.model} has no node {unknown[0]!r}; its nodes: {', '.join(names[:8])} ... {names[-1]}"
        )
    nodes = list(config.nodes) or find_convolutions(model)
    if not nodes:
        raise ConfigError(f"{config.model}: found no convolutional layers; choose nodes with --node")
    if not config.nodes and len(nodes) > config.max_layers:
        nodes = [nodes[index] for index in np.linspace(0, len(nodes) - 1, config.max_layers).round().astype(int)]
    return nodes, names[-1]


def _assign_weights(network: nn.Module, weights: Mapping[str, Tensor], config: ActivationConfig) -> None:
    needed = network.state_dict()
    if missing := sorted(set(needed) - set(weights)):
        raise ConfigError(
            f"weights {config.weights} lack {len(missing)} of the {len(needed)} tensors that these layers of "
            f"{config.model} need, such as {missing[0]}; use weights of {config.model}, or choose earlier nodes"
        )
    try:
        network.load_state_dict({name: weights[name] for name in needed})
    except RuntimeError as error:
        raise ConfigError(f"weights {config.weights} do not fit {config.model}: {error}") from error


def _normalize(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """Returns `[1, 3, height, width] float32`."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (pixels - mean) / std


def _rank_classes(logits: Tensor, config: ActivationConfig) -> list[tuple[str, float]]:
    probabilities = logits.flatten().float().softmax(0).cpu()
    top = probabilities.topk(min(_REPORTED_CLASSES, len(probabilities)))
    names: list[str] = torchvision.models.get_model_weights(config.model).DEFAULT.meta.get("categories", [])
    if len(names) != len(probabilities):
        names = [f"class {number}" for number in range(len(probabilities))]
    return [(names[index], value) for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
