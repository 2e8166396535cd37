"""Converts the output of vision transformers and convolutional networks to features."""

from typing import Literal, cast, get_args

from torch import Tensor

from captionlib.errors import ConfigError

__all__ = ["Node", "check_node", "select_class_token", "to_feature_map"]

Node = Literal["pooled", "class_token", "feature_map"]
"""The output that is used as features.

`pooled` is the pooled vector. `class_token` is the output of the class token. `feature_map` is the output of all
positions of the image, without the class token and register tokens.
"""


def check_node(model: str, node: str) -> Node:
    """Returns `node`, or raises ConfigError if there is no node of this name. `model` is for the error message."""
    if node not in get_args(Node):
        raise ConfigError(
            f"encoder.node: {model} has the nodes {', '.join(get_args(Node))}, got {node}; for example, pass "
            "--set encoder.node=pooled"
        )
    return cast(Node, node)


def select_class_token(output: Tensor, model: str, has_class_token: bool) -> Tensor:
    """Returns the first of `[batch, tokens, channels]`, or raises ConfigError if there is no class token."""
    if output.dim() != 3 or not has_class_token:
        raise ConfigError(f"encoder.node: {model} has no class token; use pooled or feature_map")
    return output[:, 0]


def to_feature_map(output: Tensor, model: str, height: int, width: int) -> Tensor:
    """Returns feature maps, `[batch, channels, height, width]`.

    `output` is a batch of feature maps, or `[batch, tokens, channels]`, where the last tokens are the positions, row by
    row. Raises ConfigError if there are fewer positions than `height * width`.
    """
    if output.dim() == 4:
        return output
    positions = height * width
    if output.dim() != 3 or output.shape[1] < positions or not positions:
        raise ConfigError(
            f"encoder.node: {model} has an output of shape {list(output.shape)}, which is not a feature map of "
            f"{height} x {width} positions; use pooled"
        )
    return output[:, -positions:].transpose(1, 2).reshape(len(output), -1, height, width)
