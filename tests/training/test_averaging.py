import pytest
import torch
from torch import nn

from captionlib.training.optimization import apply_average, average_weights


class Weight(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))


def test_average_matches_hand_computed_values() -> None:
    model = Weight(1.0)
    average = average_weights(model, decay=0.25)
    for value in (2.0, 4.0, 8.0):
        model.value.data.fill_(value)
        average.update_parameters(model)
    # The first update copies. The second keeps (1 + 1) / (10 + 1), less than 0.25; the third (1 + 2) / (10 + 2) = 0.25.
    second = 2 / 11 * 2 + 9 / 11 * 4
    with apply_average(model, average):
        assert model.value.item() == pytest.approx(0.25 * second + 0.75 * 8)
    assert model.value.item() == 8.0


def test_original_weights_are_restored_exactly_even_after_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    average = average_weights(model, decay=0.9)
    original = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in average.module.parameters():
        parameter.data.add_(1)
    with pytest.raises(RuntimeError, match="validation fails"), apply_average(model, average):
        assert all(not torch.equal(before, now) for before, now in zip(original, model.parameters(), strict=True))
        raise RuntimeError("validation fails")
    assert all(torch.equal(before, after) for before, after in zip(original, model.parameters(), strict=True))


def test_average_resumes_from_its_state() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    uninterrupted, interrupted = average_weights(model, 0.9), average_weights(model, 0.9)
    uninterrupted.update_parameters(model)
    interrupted.update_parameters(model)
    model.weight.data.add_(1)
    resumed = average_weights(model, 0.9)
    resumed.load_state_dict(interrupted.state_dict())
    for _ in range(2):
        model.weight.data.mul_(3)
        uninterrupted.update_parameters(model)
        resumed.update_parameters(model)
    assert all(
        torch.equal(expected, resumed.state_dict()[name]) for name, expected in uninterrupted.state_dict().items()
    )
