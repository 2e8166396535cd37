"""Training settings, optimizers, learning-rate schedules and weight averaging."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from captionlib.config import configclass

__all__ = ["TrainingConfig", "apply_average", "average_weights", "make_optimizer", "make_scheduler", "schedule_factor"]

_RMSPROP_DECAY = 0.999  # as in NeuralTalk
_COSINE_FLOOR = 0.01  # final learning rate, as a fraction of the base learning rate


@configclass
class TrainingConfig:
    """Settings of the optimizer, the learning-rate schedule and the training loop.

    Attributes:
        epochs: the maximum number of passes over the training data.
        optimizer: `rmsprop` (with the bias correction of Adam), `adam` or `adamw`.
        learning_rate: the base learning rate, which the schedule scales.
        weight_decay: the weight decay of `adamw`.
        schedule: `constant`, or `cosine`, which lowers the learning rate to a hundredth over all epochs.
        warmup_steps: the number of steps over which the learning rate rises linearly from zero.
        clip_value: clip each element of the gradient to this magnitude. If None, elements are not clipped.
        clip_norm: clip the norm of the gradient to this value. If None, the norm is not clipped.
        ema_decay: validate and save an exponential moving average of the weights with this decay, such as 0.999. If
            None, the weights themselves are used.
        precision: if `bfloat16`, the loss is computed under autocast. Weights and validation stay in float32. On a CPU
            with avx512_bf16, `bfloat16` may be faster or slower than `float32`, so compare an epoch of each.
        unigram_patience: stop with an error after this many consecutive epochs with a validation perplexity above that
            of a unigram model (word frequencies alone). If None, such epochs are allowed.
        patience: stop after this many epochs without a better validation score. If None, all epochs are run.
        checkpoint_interval_seconds: the time between saves of the run's state within an epoch.
        seed: the seed for the order of the data, dropout and the initial weights.
    """

    epochs: PositiveInt = 20
    optimizer: Literal["rmsprop", "adam", "adamw"] = "rmsprop"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    clip_value: PositiveFloat | None = 5.0
    clip_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    unigram_patience: PositiveInt | None = 3
    patience: NonNegativeInt | None = 3
    checkpoint_interval_seconds: NonNegativeFloat = 300.0
    seed: int = 0


def make_optimizer(
    model: nn.Module, config: TrainingConfig, module_learning_rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Returns an optimizer for the parameters that require gradients, with one parameter group per learning rate.

    `module_learning_rates` is as in `Objective`.
    """
    rates = module_learning_rates or {}
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = name.split(".")[0]
            modules.setdefault(module if module in rates else "", []).append(parameter)
    groups = [{"params": group, "lr": rates.get(name, config.learning_rate)} for name, group in modules.items()]
    if config.optimizer == "rmsprop":
        # Adam without momentum is RMSprop with bias correction. Without the correction, the mean square starts near
        # zero, and the first step is 1 / sqrt(1 - decay) = 32 times as large as the learning rate.
        return torch.optim.Adam(groups, betas=(0.0, _RMSPROP_DECAY), fused=True)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps_per_epoch: int) -> LambdaLR:
    """Returns a scheduler, which must be stepped after each optimizer step."""
    return LambdaLR(optimizer, lambda step: schedule_factor(config, step, steps_per_epoch))


def schedule_factor(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Returns the learning rate after `step` steps of the whole run, as a fraction of the base learning rate."""
    factor = 1.0
    if config.schedule == "cosine":
        cosine = (1 + math.cos(math.pi * min(step / max(1, steps_per_epoch) / config.epochs, 1.0))) / 2
        factor = _COSINE_FLOOR + (1 - _COSINE_FLOOR) * cosine
    return factor * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else factor


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """Returns an exponential moving average of a model's weights, to be updated after each optimizer step.

    The first update copies the weights. At the n-th update after that, the decay is at most (1 + n) / (10 + n), as in
    TensorFlow's `ExponentialMovingAverage`, so that early weights fade quickly.
    """

    @torch.no_grad()
    def update(averages: Iterable[Tensor], weights: Iterable[Tensor], updates: Tensor | int) -> None:
        limited_decay = min(decay, (1 + int(updates)) / (10 + int(updates)))
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - limited_decay)

    return AveragedModel(model, multi_avg_fn=update)


@contextmanager
def apply_average(model: nn.Module, average: AveragedModel) -> Iterator[None]:
    """Replaces the model's weights with their averages within the block."""
    original = [parameter.detach().clone() for parameter in model.parameters()]
    _copy_weights(average.module.parameters(), model)
    try:
        yield
    finally:
        _copy_weights(original, model)


@torch.no_grad()
def _copy_weights(weights: Iterable[Tensor], model: nn.Module) -> None:
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)
