"""Encoder networks as PyTorch modules: torchvision models truncated at nodes of their computation graphs.

Importing torchvision is slow, so only the functions that need it import it.
"""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.fusion import fuse_conv_bn_eval
from typing_extensions import Self

from captionlib.data.images.decoding import Preprocessing
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.encoders.vgg import VGG_URLS, truncate_vgg

__all__ = [
    "EncoderNetwork",
    "EvalModeNetwork",
    "build_network",
    "flatten_positions",
    "list_parameters_before",
    "require_finite",
    "slice_network",
    "truncate_network",
]

# Caffe's names of VGG's fully connected layers, and the nodes of the ReLUs after these layers.
_VGG_ALIASES = {"fc6": "classifier.1", "fc7": "classifier.4"}


class EvalModeNetwork(nn.Module):
    """A network that stays in evaluation mode, even while it is fine-tuned.

    With `autocast`, it computes in bfloat16 and keeps the weights in their own dtype.
    """

    def __init__(self, network: nn.Module, autocast: bool) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self._autocast = autocast
        self.train()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def run_network(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16) if self._autocast else nullcontext():
            output: Tensor = self.network(inputs)["features"]
        return output.float()


class EncoderNetwork(EvalModeNetwork):
    """A truncated network with normalization before it and pooling after it.

    Args:
        network: result of `truncate_network`, with its weights loaded.
        pooling: `none` keeps a spatial feature map whole; `mean` and `max` reduce it over positions.
        stored_dtype: dtype that `encode` rounds features to.
        trainable: keep float32 weights regardless of `dtype`, so that small updates are not rounded away.
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
        input_dtype = torch.float32 if trainable else dtype
        if not trainable and isinstance(network, GraphModule):
            _fuse_batch_norms(network.float())
        super().__init__(network.to(dtype=input_dtype), autocast=input_dtype != dtype)
        self._input_dtype = input_dtype
        self._pooling = pooling
        self._stored_dtype = stored_dtype
        mean, std = (torch.tensor(values) for values in (preprocessing.mean, preprocessing.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Computes features, `[batch, size]` or `[batch, positions, channels]`, from `[batch, crop, crop, 3] uint8`."""
        batch, height, width, _ = pixels.shape
        rows = pixels.reshape(batch, height, -1).float()  # PyTorch is slow if its inner loop has only 3 iterations
        rows = rows.mul_(self.scale.repeat(width)).sub_(self.shift.repeat(width)).to(self._input_dtype)
        images = rows.view(pixels.shape).permute(0, 3, 1, 2)  # a view in channels_last
        return self._pool(self.run_network(images))

    def encode(self, pixels: Tensor) -> Tensor:
        """Computes features as `forward` does, and rounds them to the stored dtype. Raises DatasetError on overflow."""
        features = self.encode_unchecked(pixels)
        require_finite(features)
        return features

    def encode_unchecked(self, pixels: Tensor) -> Tensor:
        """Computes features as `encode` does, without waiting for the GPU; call `require_finite` afterwards."""
        features: Tensor = self(pixels).to(self._stored_dtype)
        return features

    def export_weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}

    def _pool(self, output: Tensor) -> Tensor:
        if output.dim() == 4 and self._pooling == "mean":
            return output.mean((2, 3))
        if output.dim() == 4 and self._pooling == "max":
            return output.amax((2, 3))
        if output.shape[2:].numel() == 1:  # a vector, or a feature map with a single position
            return output.flatten(1)
        return flatten_positions(output).contiguous()


def _fuse_batch_norms(network: GraphModule) -> None:
    modules = dict(network.named_modules())
    for name, next_name in _list_successive_modules(network):
        convolution, norm = modules.get(name), modules.get(next_name)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            network.set_submodule(name, fuse_conv_bn_eval(convolution, norm))
            network.set_submodule(next_name, nn.Identity())


def _list_successive_modules(network: GraphModule) -> Iterator[tuple[str, str]]:
    """Yields the names of pairs of modules in which only the second uses the output of the first."""
    for operation in network.graph.nodes:
        if operation.op == "call_module" and [len(each.users) for each in operation.all_input_nodes] == [1]:
            yield str(operation.all_input_nodes[0].target), str(operation.target)
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential):  # part of a module that the graph calls as a whole
            yield from pairwise(f"{name}.{child}" for child, _ in module.named_children())


def flatten_positions(output: Tensor) -> Tensor:
    """Reshapes feature maps to `[batch, positions, channels]`, and other outputs to `[batch, size]`."""
    return output.flatten(2).transpose(1, 2) if output.dim() == 4 else output.flatten(1)


def require_finite(features: Tensor) -> None:
    """Checks that features contain neither infinity nor NaN. On a GPU, this waits until the features are computed.

    Raises:
        DatasetError: the features contain infinity or NaN.
    """
    if not features.isfinite().all():
        raise DatasetError(
            f"the encoder's features overflow {str(features.dtype).removeprefix('torch.')} or are NaN; set "
            "encoder.stored_dtype to float32, or check the weights"
        )


def build_network(name: str) -> nn.Module:
    """Builds a torchvision model without trained weights, in evaluation mode.

    Raises:
        ConfigError: torchvision has no model with this name.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if ":" in name:
        raise ConfigError(
            f"expected a torchvision model, got {name}; features of other models can be extracted, but their layers "
            "can be neither fine-tuned nor visualized"
        )
    if name not in names:
        close = difflib.get_close_matches(name, names) or names[:5]
        raise ConfigError(f"unknown model {name!r}; torchvision has {len(names)} models, among them {', '.join(close)}")
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model.eval()


def truncate_network(name: str, node: str) -> nn.Module:
    """Builds a torchvision model up to and including a node. The network returns a dictionary with the key `features`.

    Raises:
        ConfigError: the model or the node does not exist.
    """
    vgg = truncate_vgg(name, _VGG_ALIASES.get(node, node)) if name in VGG_URLS else None
    return _extract_nodes(name, {node: "features"}) if vgg is None else vgg


def slice_network(name: str, start: str, node: str) -> nn.Module:
    """Builds the layers of a torchvision model after the node `start`, up to `node`; see `truncate_network`.

    Raises:
        ConfigError: the model or a node does not exist, or `node` does not depend on `start` alone.
    """
    extractor = _extract_nodes(name, {start: "start", node: "features"})
    graph = extractor.graph
    output = next(operation for operation in graph.nodes if operation.op == "output")
    end = output.args[0]["features"]
    begin = output.args[0].get("start", end)  # if both are the same node, only the second name remains
    image = next(operation for operation in graph.nodes if operation.op == "placeholder")
    with graph.inserting_before(image):
        maps = graph.placeholder("maps")
    begin.replace_all_uses_with(maps)
    output.args = ({"features": end},)
    graph.eliminate_dead_code()
    if image.users or begin is end:
        raise ConfigError(
            f"{name}: expected a node that comes after {start} and depends on it alone, got {node}; choose a later "
            "node, or features of a different node"
        )
    graph.erase_node(image)
    return GraphModule(extractor, graph)  # copies only the remaining layers


def list_parameters_before(name: str, node: str) -> set[str]:
    """Returns the names of the parameters and buffers that precede a node in a torchvision model's graph.

    The node may also be a module that contains nodes, such as `layer4`.

    Raises:
        ConfigError: the model or the node does not exist.
    """
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    with torch.device("meta"):  # only the names matter
        model = build_network(name)
    _, nodes = get_graph_node_names(model)
    first = next((index for index, candidate in enumerate(nodes) if f"{candidate}.".startswith(f"{node}.")), None)
    if first is None:
        raise _unknown_node(name, node, nodes)
    before = nodes[1:first]  # the first node is the input
    return set(create_feature_extractor(model, before).state_dict()) if before else set()


def _extract_nodes(name: str, outputs: Mapping[str, str]) -> GraphModule:
    """Builds a torchvision model that returns the outputs of nodes. `outputs` maps nodes to names of outputs."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = build_network(name)
    _, nodes = get_graph_node_names(model)
    return_nodes = {}
    for node, output_name in outputs.items():
        graph_node = _VGG_ALIASES.get(node, node) if name.startswith("vgg") else node
        if graph_node not in nodes:
            raise _unknown_node(name, node, nodes)
        return_nodes[graph_node] = output_name
    extractor: GraphModule = create_feature_extractor(model, return_nodes)
    return extractor


def _unknown_node(model: str, node: str, nodes: list[str]) -> ConfigError:
    close = difflib.get_close_matches(node, nodes, n=5) or nodes[-5:]
    return ConfigError(f"{model} has no node {node!r}; similar nodes: {', '.join(close)}")
