"""What the convolution layers of a network answer to one image, and which class it takes it for."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.data.images.fetching import ImageFetcher
from captionlib.errors import ConfigError
from captionlib.models.devices import resolve_device
from captionlib.models.encoders.encoder import resolve_preprocessing
from captionlib.models.encoders.network import build_network
from captionlib.models.encoders.weights import find_class_names, load_weights

__all__ = ["ActivationConfig", "Activations", "LayerActivations", "compute_activations", "find_convolutions"]

_REPEAT = re.compile(r"_\d+$")  # of a module that is used again
_AFTER = nn.BatchNorm2d | nn.ReLU | nn.ReLU6 | nn.SiLU | nn.Hardswish | nn.GELU
_RELU = re.compile(r"(?:^|\.)relu\d*$")


@dataclass(frozen=True)
class ActivationConfig:
    """Which network is looked into, and where.

    Attributes:
        model: a torchvision model name, such as `vgg16` or `resnet50`.
        weights: a torchvision weights name, a `.safetensors` or `.pth` file, or `random:SEED`.
        nodes: of its graph, each with a map a channel; none takes every convolution, after what follows it at once
            (batch normalisation, ReLU).
        max_layers: where there are more convolutions, so many of them are taken, evenly.
        classes: the most likely classes to tell.
        resize_size: the shorter side before the crop in pixels; None as the weights were trained.
    """

    model: str = "vgg16"
    weights: str = "IMAGENET1K_V1"
    nodes: tuple[str, ...] = ()
    max_layers: int = 16
    classes: int = 10
    resize_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_layers", "classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class LayerActivations:
    """The channels of a layer.

    Attributes:
        node: of the network's graph.
        maps: `[channels, height, width] float32`.
    """

    node: str
    maps: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Activations:
    """What a network answers to an image.

    Attributes:
        image: the pixels that it sees, `[height, width, 3] uint8`.
        layers: in the order of the network.
        classes: names and probabilities, the most likely first; none where the weights are no classifier's.
        note: why there are no classes; empty where there are.
    """

    image: npt.NDArray[np.uint8]
    layers: Sequence[LayerActivations]
    classes: Sequence[tuple[str, float]]
    note: str


def compute_activations(uri: str | os.PathLike[str], config: ActivationConfig, device: str = "auto") -> Activations:
    """Runs an image through a network and keeps what its layers answer.

    Args:
        uri: the image's path or address.
        config: the network and its layers.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: no such model, weights, node or device; or a node that has no channel maps.
        FetchError: the image cannot be read.
        DecodeError: it is no image.
    """
    target = resolve_device(device)
    network, classifier, note = _load(config)
    preprocessing = resolve_preprocessing(config.model, config.weights, config.resize_size)
    with ImageFetcher() as fetcher:
        image = decode_image(fetcher.fetch(os.fspath(uri)), preprocessing)
    with torch.inference_mode():
        outputs: Mapping[str, Tensor] = network.to(target)(_to_input(image, preprocessing).to(target))
    layers = []
    for node, output in outputs.items():
        if node == classifier and node not in config.nodes:
            continue
        if output.dim() != 4:
            raise ConfigError(f"{config.model}: node {node} has no channel maps, its output is {list(output.shape)}")
        layers.append(LayerActivations(node, output[0].float().cpu().numpy()))
    classes = _name_classes(outputs[classifier], config) if classifier else []
    return Activations(image, layers, classes, note)


def find_convolutions(model: nn.Module) -> list[str]:
    """The nodes of a network's convolutions, each after the normalisation and the activation that follow it."""
    modules = dict(model.named_modules())
    _, names = get_graph_node_names(model)
    found = []
    for number, name in enumerate(names):
        if not isinstance(modules.get(_REPEAT.sub("", name)), nn.Conv2d):
            continue
        end = number
        while end + 1 < len(names) and _follows(names[end + 1], modules):
            end += 1
        found.append(names[end])
    return found


def _follows(name: str, modules: Mapping[str, nn.Module]) -> bool:
    plain = _REPEAT.sub("", name)
    return isinstance(modules.get(plain), _AFTER) or bool(_RELU.search(plain))


def _load(config: ActivationConfig) -> tuple[nn.Module, str, str]:
    """The network with its weights, the node of its classes if it has them, and why it has none if it does not."""
    model = build_network(config.model)
    _, names = get_graph_node_names(model)
    if unknown := [node for node in config.nodes if node not in names]:
        raise ConfigError(f"{config.model} has no node {unknown[0]!r}; it has {', '.join(names[:8])} ... {names[-1]}")
    nodes = list(config.nodes) or _spread(find_convolutions(model), config.max_layers)
    if not nodes:
        raise ConfigError(f"{config.model} has no convolutions that can be found; name its nodes")
    whole = create_feature_extractor(model, list(dict.fromkeys([*nodes, names[-1]])))
    weights = load_weights(config.model, config.weights, whole)
    lacking = sorted(set(whole.state_dict()) - set(weights))
    network, classifier, note = whole, names[-1], ""
    if config.weights.startswith("random:"):
        classifier, note = "", "The weights are drawn at random: the network has learned no classes."
    elif lacking:
        classifier = ""
        note = f"The weights have no classifier (they lack {lacking[0]} and {len(lacking) - 1} more): no classes."
    if not classifier:
        network = create_feature_extractor(model, nodes)
    while not config.nodes and len(nodes) > 1 and set(network.state_dict()) - set(weights):
        nodes = nodes[:-1]  # the last convolutions may be the classifier's own
        network = create_feature_extractor(model, nodes)
    _fill(network, weights, config)
    return network.eval(), classifier, note


def _fill(network: nn.Module, weights: Mapping[str, Tensor], config: ActivationConfig) -> None:
    """Gives the network its weights."""
    needed = network.state_dict()
    if missing := sorted(set(needed) - set(weights)):
        raise ConfigError(
            f"weights {config.weights} lack {len(missing)} of the {len(needed)} tensors that these layers of "
            f"{config.model} need, such as {missing[0]}; give weights of {config.model}, or nodes before them"
        )
    try:
        network.load_state_dict({name: weights[name] for name in needed})
    except RuntimeError as error:
        raise ConfigError(f"weights {config.weights} are of another network than {config.model}: {error}") from error


def _spread(nodes: Sequence[str], count: int) -> list[str]:
    """So many of the nodes, evenly, the first and the last among them."""
    if len(nodes) <= count:
        return list(nodes)
    return [nodes[number] for number in np.linspace(0, len(nodes) - 1, count).round().astype(int)]


def _to_input(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """`[1, 3, height, width]` as the network was trained on."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (preprocessing.mean, preprocessing.std))
    return (pixels - mean) / std


def _name_classes(output: Tensor, config: ActivationConfig) -> list[tuple[str, float]]:
    probabilities = output.flatten().float().softmax(0).cpu()
    top = probabilities.topk(min(config.classes, len(probabilities)))
    names = find_class_names(config.model, len(probabilities))
    return [(names[index], value) for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
