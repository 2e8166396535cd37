from typing import Any

import pytest
import torch
from torch import nn

from captionlib.errors import ConfigError
from captionlib.training.optimization import TrainingConfig, make_optimizer, make_scheduler, schedule_factor

RATE = 0.5


def rates(steps_per_epoch: int = 2, epochs: int = 4, **values: Any) -> list[float]:
    """Returns the learning rate that the optimizer has in each step."""
    config = TrainingConfig(learning_rate=RATE, epochs=epochs, **values)
    optimizer = make_optimizer(nn.Linear(1, 1), config)
    scheduler = make_scheduler(optimizer, config, steps_per_epoch)
    used = []
    for _ in range(steps_per_epoch * epochs):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_constant_schedule_keeps_the_rate() -> None:
    assert rates() == [RATE] * 8


def test_cosine_schedule_decays_to_a_hundredth() -> None:
    decaying = rates(schedule="cosine")
    assert decaying == sorted(decaying, reverse=True)
    assert decaying[0] == RATE
    assert decaying[4] == pytest.approx(RATE * (0.01 + 0.99 / 2))
    config = TrainingConfig(learning_rate=RATE, epochs=4, schedule="cosine")
    assert schedule_factor(config, 8, 2) == schedule_factor(config, 9, 2) == pytest.approx(1 / 100)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_rises_linearly_to_the_schedule(schedule: Any) -> None:
    warm, cold = rates(schedule=schedule, warmup_steps=4), rates(schedule=schedule)
    factors = [rate / full for rate, full in zip(warm, cold, strict=True)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "adamw"])
def test_frozen_parameters_are_not_optimized(optimizer: Any) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model, TrainingConfig(optimizer=optimizer, learning_rate=RATE))
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 1
    assert group["params"][0] is model.weight
    assert group["lr"] == RATE


def test_part_of_the_model_has_its_own_rate() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "captioner": nn.Linear(2, 2)})
    optimizer = make_optimizer(model, TrainingConfig(optimizer="adam", learning_rate=RATE), {"encoder": 0.01})
    parts = {group["lr"]: group["params"] for group in optimizer.param_groups}
    assert parts.keys() == {0.01, RATE}
    for rate, name in ((0.01, "encoder"), (RATE, "captioner")):
        assert [id(parameter) for parameter in parts[rate]] == [id(p) for p in model[name].parameters()]


def test_rmsprop_steps_match_hand_computed_values() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    module = nn.Module()
    module.weight = weight
    optimizer = make_optimizer(module, TrainingConfig(optimizer="rmsprop", learning_rate=0.1))
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.1)  # the corrected mean square is the first gradient's square
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    mean_square = (0.999 * 0.001 * 2**2 + 0.001 * 1**2) / (1 - 0.999**2)
    assert weight.item() == pytest.approx(0.9 - 0.1 * 1 / mean_square**0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"learning_rate": 0},
        {"warmup_steps": -1},
        {"clip_value": 0},
        {"clip_norm": -1},
        {"ema_decay": 1.0},
    ],
)
def test_rejects_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))}: Input should be"):
        TrainingConfig(**values)
