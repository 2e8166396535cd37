"""What an encoder computes, as a module: pixels to features, with gradients where someone wants to tune it."""

import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from captionlib.data.images.decoding import Preprocessing
from captionlib.errors import ConfigError

__all__ = [
    "EncoderNetwork",
    "build_network",
    "list_parameters_before",
    "require_finite",
    "slice_network",
    "truncate_network",
]

# The talk's names for VGG's layers, and the nodes that follow their ReLU.
_VGG_ALIASES = {"fc6": "classifier.1", "fc7": "classifier.4"}


class EncoderNetwork(nn.Module):
    """A cut network, and what stands before and behind it. It keeps to evaluation mode, also while it is tuned.

    Args:
        network: what `truncate_network` gave, with its weights.
        preprocessing: its mean and deviation are applied here.
        pooling: what becomes of a spatial map: kept whole (`none`), or its `mean` or `max` over positions.
        dtype: what it computes in.
        stored_dtype: what features are rounded to, wherever they go.
        trainable: keep the weights float32 whatever it computes in, so that small steps are not rounded away.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        pooling: Literal["none", "mean", "max"],
        dtype: torch.dtype,
        stored_dtype: torch.dtype,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self._input_dtype = torch.float32 if trainable else dtype
        self._autocast = self._input_dtype != dtype
        self._pooling = pooling
        self._stored_dtype = stored_dtype
        self.network = network.to(dtype=self._input_dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "EncoderNetwork":
        """Changes nothing: batch normalisation and dropout are as the features will be made, whatever `mode`."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features as they are computed.

        Args:
            pixels: `[batch, crop, crop, 3] uint8`, RGB.

        Returns:
            `[batch, size]` or `[batch, positions, channels]`, float32.
        """
        images = pixels.permute(0, 3, 1, 2)  # a view: channels_last is how decoded images lie in memory
        inputs = (images * self.scale - self.shift).to(self._input_dtype)
        with torch.autocast(pixels.device.type, torch.bfloat16) if self._autocast else nullcontext():
            output: Tensor = self.network(inputs)["features"]
        return self._pool(output.float())

    def encode(self, pixels: Tensor) -> Tensor:
        """Features as they are stored: of the stored dtype.

        Args:
            pixels: see `forward`.

        Raises:
            ConfigError: they do not fit into it.
        """
        features = self.begin(pixels)
        require_finite(features)
        return features

    def begin(self, pixels: Tensor) -> Tensor:
        """The same, unchecked: on a GPU it is begun alone, and the one who waits for it owes `require_finite`."""
        features: Tensor = self(pixels).to(self._stored_dtype)
        return features

    def export_weights(self) -> dict[str, Tensor]:
        """The network's weights by torchvision's names, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}

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


def require_finite(features: Tensor) -> None:
    """Checks features; on a GPU the question waits until they are there.

    Raises:
        ConfigError: they do not fit into their dtype, or are no numbers.
    """
    if not features.isfinite().all():
        raise ConfigError(
            f"the encoder's features do not fit into {str(features.dtype).removeprefix('torch.')}, or are not "
            "numbers; set encoder.stored_dtype to float32, or check the weights"
        )


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


def truncate_network(name: str, node: str) -> nn.Module:
    """A torchvision model up to one of its nodes, whose output it gives as `features`.

    Raises:
        ConfigError: there is no such model or node.
    """
    return _cut(name, {node: "features"})


def slice_network(name: str, start: str, node: str) -> nn.Module:
    """A torchvision model from the output of one of its nodes, its input here, to another one's, given as `features`.

    Raises:
        ConfigError: there is no such model or node; or what lies between needs more than the output of `start`.
    """
    extractor = _cut(name, {start: "start", node: "features"})
    graph = extractor.graph
    output = next(part for part in graph.nodes if part.op == "output")
    end = output.args[0]["features"]
    begin = output.args[0].get("start", end)  # both are one node, and the second name is the one that is left
    image = next(part for part in graph.nodes if part.op == "placeholder")
    with graph.inserting_before(image):
        given = graph.placeholder("maps")
    begin.replace_all_uses_with(given)
    output.args = ({"features": end},)
    graph.eliminate_dead_code()
    if image.users or begin is end:
        raise ConfigError(
            f"{name}: expected a node that comes after {start} and is computed from it alone, got {node}; give a later "
            "one, or features of another node"
        )
    graph.erase_node(image)
    return GraphModule(extractor, graph)  # with the layers that are left alone


def _cut(name: str, outputs: Mapping[str, str]) -> GraphModule:
    """A torchvision model up to some of its nodes, whose outputs it gives by the names that they have here."""
    model = build_network(name)
    _, nodes = get_graph_node_names(model)
    wanted = {}
    for node, given in outputs.items():
        known = _VGG_ALIASES.get(node, node) if name.startswith("vgg") else node
        if known not in nodes:
            raise _no_such_node(name, node, nodes)
        wanted[known] = given
    extractor: GraphModule = create_feature_extractor(model, wanted)
    return extractor


def list_parameters_before(name: str, node: str) -> set[str]:
    """The parameters and buffers of a torchvision model that come before a node, in the order of its graph.

    Args:
        name: of the model.
        node: of its graph, or a module that holds nodes, such as `layer4`.

    Raises:
        ConfigError: there is no such model or node.
    """
    with torch.device("meta"):  # names alone are wanted
        model = build_network(name)
    _, nodes = get_graph_node_names(model)
    first = next((place for place, found in enumerate(nodes) if f"{found}.".startswith(f"{node}.")), None)
    if first is None:
        raise _no_such_node(name, node, nodes)
    before = nodes[1:first]  # the first is the input
    return set(create_feature_extractor(model, before).state_dict()) if before else set()


def _no_such_node(model: str, node: str, nodes: list[str]) -> ConfigError:
    close = difflib.get_close_matches(node, nodes, n=5) or nodes[-5:]
    return ConfigError(f"{model} has no node {node!r}; near it: {', '.join(close)}")
