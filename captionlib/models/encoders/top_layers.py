"""The top layers of an encoder, which are fine-tuned as part of a captioner.

The lower layers are frozen, so their output is computed once and stored in a features dataset.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.encoders.network import EvalModeNetwork, flatten_positions, slice_network, truncate_network
from captionlib.models.encoders.weights import choose_build_device, hash_weights, load_weights

__all__ = ["EncoderTop"]


class EncoderTop(EvalModeNetwork):
    """The layers between two nodes of an encoder; stays in evaluation mode, even while it is fine-tuned.

    Its weights are uninitialized until `load_weights` or `load_state_dict` is called.

    Args:
        encoder: `Encoder.description` of the encoder whose features are the input.
        node: node of the encoder's network whose output is returned.

    Raises:
        ConfigError: the node does not follow the encoder's node, or the input or the output is not a feature map.
    """

    def __init__(self, encoder: Mapping[str, Any], node: str) -> None:
        if encoder["weights"] == "imported" or len(encoder["shape"]) == 1:  # imported features or vectors
            raise ConfigError(
                "captioner.encoder_top: expected feature maps of a torchvision network, got features of shape "
                f"{encoder['shape']} from {encoder['model']} at {encoder['node']}; extract features with pooling none "
                "at a node such as features.23 of vgg16, or leave captioner.encoder_top out"
            )
        with torch.device("meta"), torch.no_grad():  # neither initializes weights nor computes features
            network = slice_network(encoder["model"], encoder["node"], node)
            features = network(_to_grid(torch.zeros(1, *encoder["shape"])))["features"]
        super().__init__(network.to_empty(device=torch.get_default_device()), encoder["dtype"] == "bfloat16")
        self._encoder, self._node = encoder, node
        self.shape: list[int] = list(flatten_positions(features).shape[1:])
        if len(self.shape) != 2:
            raise ConfigError(
                f"captioner.encoder_top: expected a node that outputs a feature map, got {node} with output shape "
                f"{self.shape}; choose a node such as features.29 of vgg16"
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Computes the node's output from square feature maps, both `[images, positions, channels] float32`."""
        return flatten_positions(self.run_network(_to_grid(maps)))

    def load_weights(self, weights: str | None) -> None:
        """Loads the weights that these layers have in the encoder.

        `weights` is the encoder's weights file; None if the encoder was not loaded from a file.

        Raises:
            CheckpointError: `weights` are not the encoder's weights.
            ConfigError: `weights` are required but None, or lack some of these layers.
        """
        encoder = self._encoder
        source = weights or encoder["weights"]
        if source == "file":
            raise ConfigError(
                "captioner.encoder_top starts from the encoder's weights, which came from a file; specify its path "
                "with --weights"
            )
        with choose_build_device(source):
            network = truncate_network(encoder["model"], self._node)
        tensors = load_weights(encoder["model"], source, network)
        needed = self.network.state_dict()
        if missing := sorted(set(needed) - set(tensors)):
            raise ConfigError(
                f"weights {source} lack tensors that captioner.encoder_top {self._node} needs: {', '.join(missing)}"
            )
        with torch.device("meta"):  # only the names matter
            names = truncate_network(encoder["model"], encoder["node"]).state_dict()
        used = {name: tensors[name] for name in names if name in tensors}
        if hash_weights(used) != encoder["weights_sha256"]:
            raise CheckpointError(
                f"weights {source} differ from the weights of the encoder that computed these features; specify "
                "the file that extract-features used"
            )
        self.network.load_state_dict({name: tensors[name] for name in needed})


def _to_grid(maps: Tensor) -> Tensor:
    """Reshapes `[images, positions, channels]` to `[images, channels, side, side]`."""
    side = math.isqrt(maps.shape[1])
    return maps.view(len(maps), side, side, -1).permute(0, 3, 1, 2)
