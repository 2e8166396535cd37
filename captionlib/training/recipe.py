"""How a model is trained: the settings of a run, its optimizer and its learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from captionlib.errors import ConfigError

__all__ = ["LoopConfig", "learning_rate", "make_optimizer"]


@dataclass(frozen=True)
class LoopConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the training images at the most.
        optimizer: `rmsprop` as in the talk, or `adam`, or `adamw`.
        learning_rate: of the optimizer, before the schedule.
        rmsprop_decay: of RMSprop's average of squares (NeuralTalk's 0.999).
        weight_decay: of AdamW.
        schedule: `constant`, or `cosine` down to a hundredth of the learning rate over all epochs.
        clip_value: bound on each element of the gradient (the talk's 5); None is none.
        clip_norm: bound on the gradient's norm; None is none.
        patience: epochs without a better validation score after which training ends; None is never.
        save_seconds: how often the state is saved within an epoch.
        seed: of the order of the images, of dropout, and of the first weights.
    """

    epochs: int = 20
    optimizer: Literal["rmsprop", "adam", "adamw"] = "rmsprop"
    learning_rate: float = 1e-3
    rmsprop_decay: float = 0.999
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    clip_value: float | None = 5.0
    clip_norm: float | None = None
    patience: int | None = 3
    save_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"training.epochs: expected at least 1, got {self.epochs}")
        if not self.learning_rate > 0:
            raise ConfigError(f"training.learning_rate: expected more than 0, got {self.learning_rate}")


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.learning_rate, alpha=config.rmsprop_decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: LoopConfig, progress: float) -> float:
    """The learning rate of a step.

    Args:
        config: how the model is trained.
        progress: epochs done, the part of the present one among them.
    """
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(progress / config.epochs, 1.0))) / 2)
