"""The configuration of a training run, its optimizer and its learning-rate schedule."""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from captionlib.config import configclass

__all__ = ["TrainingConfig", "make_optimizer", "make_scheduler", "schedule_factor"]

_RMSPROP_ALPHA = 0.999  # NeuralTalk's
_COSINE_FLOOR = 0.01  # the last learning rate, as a fraction of the first


@configclass
class TrainingConfig:
    """How a model is trained.

    Attributes:
        epochs: the maximum number of passes over the training data.
        optimizer: `rmsprop`, `adam` or `adamw`.
        learning_rate: the learning rate before the schedule applies.
        weight_decay: the weight decay of AdamW.
        schedule: `constant`; `step`, which multiplies the learning rate by `step_factor` every `step_epochs` epochs; or
            `cosine`, which decays it to a hundredth over all epochs.
        step_epochs: see `schedule`.
        step_factor: see `schedule`.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        clip_value: clip each element of the gradient to this magnitude; None does not clip.
        clip_norm: clip the norm of the gradient; None does not clip.
        ema_decay: validate and save an exponential moving average of the weights with this decay, such as 0.999; None
            uses the weights themselves.
        precision: `bfloat16` computes the loss under autocast. Weights and validation stay in float32.
        patience: stop after this many epochs without a better validation score; None never does.
        checkpoint_interval_seconds: how often to save the state of the run within an epoch.
        seed: seeds the order of the data, dropout and the initial weights.
    """

    epochs: PositiveInt = 20
    optimizer: Literal["rmsprop", "adam", "adamw"] = "rmsprop"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    schedule: Literal["constant", "step", "cosine"] = "constant"
    step_epochs: PositiveInt = 5
    step_factor: PositiveFloat = 0.5
    warmup_steps: NonNegativeInt = 0
    clip_value: PositiveFloat | None = 5.0
    clip_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    patience: NonNegativeInt | None = 3
    checkpoint_interval_seconds: NonNegativeFloat = 300.0
    seed: int = 0


def make_optimizer(
    model: nn.Module, config: TrainingConfig, part_learning_rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Returns an optimizer for the parameters that require gradients, with one group for each learning rate.

    Args:
        model: the model to train.
        config: the optimizer and its learning rate.
        part_learning_rates: learning rates of individual attributes of the model, by name.
    """
    rates = part_learning_rates or {}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            parts.setdefault(part if part in rates else "", []).append(parameter)
    groups = [{"params": parameters, "lr": rates.get(part, config.learning_rate)} for part, parameters in parts.items()]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, alpha=_RMSPROP_ALPHA)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps_per_epoch: int) -> LambdaLR:
    """Returns a scheduler to be stepped after each step of the optimizer."""
    return LambdaLR(optimizer, lambda step: schedule_factor(config, step, steps_per_epoch))


def schedule_factor(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of a step as a fraction of the configured one.

    Args:
        config: the schedule.
        step: the steps done before it, over all epochs.
        steps_per_epoch: the steps of an epoch.
    """
    epochs = step / max(1, steps_per_epoch)
    factor = 1.0
    if config.schedule == "step":
        factor = config.step_factor ** int(epochs / config.step_epochs)
    elif config.schedule == "cosine":
        cosine = (1 + math.cos(math.pi * min(epochs / config.epochs, 1.0))) / 2
        factor = _COSINE_FLOOR + (1 - _COSINE_FLOOR) * cosine
    return factor * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else factor
