"""How a model is trained: the settings of a run, its optimizer and its learning rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from captionlib.errors import ConfigError

__all__ = ["TrainingConfig", "learning_rate", "make_optimizer"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the training images at the most.
        optimizer: `rmsprop` as in the talk, or `adam`, or `adamw`.
        learning_rate: of the optimizer, before the schedule.
        rmsprop_decay: of RMSprop's average of squares (NeuralTalk's 0.999).
        weight_decay: of AdamW.
        schedule: `constant`; `step`: times `step_factor` after every `step_epochs` epochs; or `cosine` down to a
            hundredth of the learning rate over all epochs.
        step_epochs: see `schedule`.
        step_factor: see `schedule`.
        warmup_steps: steps over which the learning rate rises from 0 to what the schedule says.
        clip_value: bound on each element of the gradient (the talk's 5); None is none.
        clip_norm: bound on the gradient's norm; None is none.
        ema_decay: validate and save a running average of the weights, of which this share stays at each step, such
            as 0.999; None is the weights as they are.
        precision: `bfloat16` computes the loss in it where that is safe (autocast; it pays on GPUs); the weights stay
            float32, and so does validation.
        patience: epochs without a better validation score after which training ends; None is never.
        checkpoint_interval_seconds: how often the state is saved within an epoch.
        seed: of the order of the images, of dropout, and of the first weights.
    """

    epochs: int = 20
    optimizer: Literal["rmsprop", "adam", "adamw"] = "rmsprop"
    learning_rate: float = 1e-3
    rmsprop_decay: float = 0.999
    weight_decay: float = 0.01
    schedule: Literal["constant", "step", "cosine"] = "constant"
    step_epochs: int = 5
    step_factor: float = 0.5
    warmup_steps: int = 0
    clip_value: float | None = 5.0
    clip_norm: float | None = None
    ema_decay: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    patience: int | None = 3
    checkpoint_interval_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("step_epochs", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"training.{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "step_factor", "clip_value", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"training.{name}: expected more than 0, got {value}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay: expected at least 0 and below 1, got {self.ema_decay}")


def make_optimizer(
    model: nn.Module, config: TrainingConfig, own_rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained, a group for each learning rate.

    Args:
        model: what is trained.
        config: how.
        own_rates: learning rates of parts of it, by the names of its attributes; all else has that of `config`.
    """
    rates = own_rates or {}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            parts.setdefault(part if part in rates else "", []).append(parameter)
    groups = [{"params": parameters, "lr": rates.get(part, config.learning_rate)} for part, parameters in parts.items()]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, alpha=config.rmsprop_decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def learning_rate(rate: float, config: TrainingConfig, progress: float, steps: int) -> float:
    """The learning rate of a step.

    Args:
        rate: before the schedule.
        config: how the model is trained.
        progress: epochs done, and the part of the present one.
        steps: steps done, of all epochs.
    """
    if config.schedule == "step":
        rate *= config.step_factor ** int(progress / config.step_epochs)
    elif config.schedule == "cosine":
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * min(progress / config.epochs, 1.0))) / 2
    return rate * min(1.0, (steps + 1) / config.warmup_steps) if config.warmup_steps else rate
