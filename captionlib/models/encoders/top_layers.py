"""The rest of an encoder's network, from the node that features were stored at on, as a part of a captioner.

What comes before the node never changes, so it is computed once and kept in `features/`; what comes behind it is tuned
with the captioner at the price of a few layers, not of a whole network.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.encoders.network import slice_network, truncate_network
from captionlib.models.encoders.weights import choose_build_device, hash_weights, load_weights

__all__ = ["EncoderTop"]


class EncoderTop(nn.Module):
    """Maps of one node of an encoder to maps of a later one. It keeps to evaluation mode, also while it is tuned.

    Its weights are those of `load_weights` or of a checkpoint; before that they are whatever lay in memory.

    Args:
        encoder: the description of the encoder whose features it takes.
        node: the node whose output it gives.

    Attributes:
        shape: of what it gives for a whole map: `[positions, channels]`.

    Raises:
        ConfigError: there is no such node behind the encoder's, or the features are no maps as they leave the network.
    """

    def __init__(self, encoder: Mapping[str, Any], node: str) -> None:
        super().__init__()
        if encoder["weights"] == "imported" or len(encoder["shape"]) == 1:
            raise ConfigError(
                f"captioner.encoder_top: expected features that are maps of a known network, got {encoder['shape']} numbers "
                f"of {encoder['model']} at {encoder['node']}; extract with pooling none at a node such as features.23 "
                "of vgg16, or leave captioner.encoder_top out"
            )
        with torch.device("meta"):  # its weights come from elsewhere and need not be drawn
            network = slice_network(encoder["model"], encoder["node"], node)
        self.network = network.to_empty(device="cpu").to(memory_format=torch.channels_last)
        self._encoder, self._node = encoder, node
        self._autocast = encoder["dtype"] == "bfloat16"
        with torch.no_grad():
            self.shape: list[int] = list(self(torch.zeros(1, *encoder["shape"])).shape[1:])
        if len(self.shape) != 2:
            raise ConfigError(
                f"captioner.encoder_top: expected a node that is a map, got {node} of {self.shape} numbers; give one that is, "
                "such as features.29 of vgg16"
            )

    def train(self, mode: bool = True) -> "EncoderTop":
        """Changes nothing: batch normalisation and dropout are as when captioning, whatever `mode`."""
        return super().train(False)

    def forward(self, maps: Tensor) -> Tensor:
        """`[images, positions, channels]` of the one node to those of the other, float32; maps are square."""
        side = math.isqrt(maps.shape[1])
        grid = maps.view(len(maps), side, side, -1).permute(0, 3, 1, 2)
        with torch.autocast(maps.device.type, torch.bfloat16) if self._autocast else nullcontext():
            output: Tensor = self.network(grid)["features"]
        return output.float().flatten(2).transpose(1, 2) if output.dim() == 4 else output.float().flatten(1)

    def load_weights(self, weights: str | None) -> None:
        """Starts with the weights that the encoder goes on with.

        Args:
            weights: the encoder's weights file, where it had them from one.

        Raises:
            CheckpointError: these weights are not the encoder's.
            ConfigError: they are missing, or lack layers of the encoder_top.
        """
        encoder = self._encoder
        source = weights or encoder["weights"]
        if source == "file":
            raise ConfigError(
                "captioner.encoder_top starts with the encoder's own weights, which came from a file; give its path with "
                "--weights"
            )
        with choose_build_device(source):
            network = truncate_network(encoder["model"], self._node)
        found = load_weights(encoder["model"], source, network)
        needed = self.network.state_dict()
        if missing := sorted(set(needed) - set(found)):
            raise ConfigError(
                f"weights {source} lack what captioner.encoder_top {self._node} needs: {', '.join(missing)}"
            )
        with torch.device("meta"):  # names alone are wanted
            before = truncate_network(encoder["model"], encoder["node"]).state_dict()
        if hash_weights({name: found[name] for name in before if name in found}) != encoder["weights_sha256"]:
            raise CheckpointError(
                f"weights {source} are not those of the encoder whose features these are; give the file that "
                "extract-features had"
            )
        self.network.load_state_dict({name: found[name] for name in needed})
