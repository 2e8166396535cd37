from typing import Any

import pytest
import torch
from torch import nn

from captionlib.errors import ConfigError
from captionlib.training.optimization import TrainingConfig, learning_rate, make_optimizer

RATE = 0.5


def rates(steps_an_epoch: int = 2, epochs: int = 4, **values: Any) -> list[float]:
    config = TrainingConfig(learning_rate=RATE, epochs=epochs, **values)
    steps = range(steps_an_epoch * epochs)
    return [learning_rate(RATE, config, step / steps_an_epoch, step) for step in steps]


def test_a_constant_rate_stays() -> None:
    assert rates() == [RATE] * 8


def test_a_step_schedule_falls_between_epochs() -> None:
    assert rates(schedule="step", step_epochs=2, step_factor=0.1) == pytest.approx([RATE] * 4 + [RATE / 10] * 4)


def test_a_cosine_falls_from_the_rate_to_a_hundredth_of_it() -> None:
    falling = rates(schedule="cosine")
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == RATE
    assert falling[4] == pytest.approx(RATE * (0.01 + 0.99 / 2))
    config = TrainingConfig(learning_rate=RATE, epochs=4, schedule="cosine")
    assert learning_rate(RATE, config, 4.0, 8) == learning_rate(RATE, config, 4.5, 9) == pytest.approx(RATE / 100)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_the_rate_warms_up_to_what_the_schedule_says(schedule: Any) -> None:
    warm, cold = rates(schedule=schedule, warmup_steps=4), rates(schedule=schedule)
    shares = [share / rate for share, rate in zip(warm, cold, strict=True)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam", "adamw"])
def test_frozen_weights_are_left_to_no_optimizer(optimizer: Any) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    made = make_optimizer(model, TrainingConfig(optimizer=optimizer, learning_rate=RATE))
    (group,) = made.param_groups
    assert len(group["params"]) == 1
    assert group["params"][0] is model.weight
    assert group["lr"] == RATE


def test_a_part_of_the_model_has_its_own_rate() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "captioner": nn.Linear(2, 2)})
    made = make_optimizer(model, TrainingConfig(optimizer="adam", learning_rate=RATE), {"encoder": 0.01})
    found = {group["lr"]: group["params"] for group in made.param_groups}
    assert found.keys() == {0.01, RATE}
    for rate, part in ((0.01, "encoder"), (RATE, "captioner")):
        assert [id(parameter) for parameter in found[rate]] == [id(p) for p in model[part].parameters()]


def test_rmsprop_steps_as_the_talk_says() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    module = nn.Module()
    module.weight = weight
    optimizer = make_optimizer(module, TrainingConfig(optimizer="rmsprop", learning_rate=0.1, rmsprop_decay=0.9))
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.1 * 2 / (0.1 * 2**2) ** 0.5)  # lr * g / sqrt(0.9 * 0 + 0.1 * g^2)


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"learning_rate": 0},
        {"step_epochs": 0},
        {"step_factor": 0},
        {"warmup_steps": -1},
        {"clip_value": 0},
        {"clip_norm": -1},
        {"ema_decay": 1.0},
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{next(iter(values))}: expected"):
        TrainingConfig(**values)
