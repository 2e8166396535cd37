"""Converts the output of vision transformers and convolutional networks to features.

`Node` selects the output that is used as features: the pooled vector, the class token or the feature map.
"""

from typing import Literal, cast, get_args

from torch import Tensor

from captionlib.errors import ConfigError

__all__ = ["Node", "check_node", "select_class_token", "to_feature_map"]

Node = Literal["pooled", "class_token", "feature_map"]
"""The kind of features.

`pooled` is the pooled vector that the model outputs. `class_token` is the output of the class token. `feature_map` is
the output of all positions of the image, without the class token and register tokens.
"""


def check_node(model: str, node: str) -> Node:
    """Checks that `node` is the name of a node, and returns it. `model` identifies the model in error messages.

    Raises:
        ConfigError: there is no node of this name.
    """
    if node not in get_args(Node):
        raise ConfigError(
            f"encoder.node: {model} has the nodes {', '.join(get_args(Node))}, got {node}; for example, pass "
            "--set encoder.node=pooled"
        )
    return cast(Node, node)


def select_class_token(output: Tensor, model: str, has_class_token: bool) -> Tensor:
    """Returns the class token, the first of `[batch, tokens, channels]`, as `[batch, channels]`.

    Raises:
        ConfigError: the model has no class token.
    """
    if output.dim() != 3 or not has_class_token:
        raise ConfigError(f"encoder.node: {model} has no class token; use pooled or feature_map")
    return output[:, 0]


def to_feature_map(output: Tensor, model: str, height: int, width: int) -> Tensor:
    """Returns feature maps, `[batch, channels, height, width]`.

    Args:
        output: feature maps, or `[batch, tokens, channels]` in which the last tokens are the positions, row by row.
        model: identifies the model in error messages.
        height: number of rows of the feature map.
        width: number of columns of the feature map.

    Raises:
        ConfigError: the output does not have `height * width` positions.
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
