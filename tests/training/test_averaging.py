import pytest
import torch
from torch import nn

from captionlib.training.averaging import WeightAverage


def test_the_average_moves_as_worked_out_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage([weight], decay=0.25)
    for value in (2.0, 4.0):
        weight.data.fill_(value)
        average.update()
    # The first step keeps 2/11 of what there was, less than 0.25; the second 3/12.
    first = 2 / 11 * 1 + 9 / 11 * 2
    with average.applied():
        assert weight.item() == pytest.approx(0.25 * first + 0.75 * 4)
    assert weight.item() == 4.0


def test_the_models_own_weights_come_back_bit_for_bit_even_after_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    average = WeightAverage(list(model.parameters()), decay=0.9)
    own = [parameter.detach().clone() for parameter in model.parameters()]
    average.update()
    with pytest.raises(RuntimeError, match="validation fails"), average.applied():
        raise RuntimeError("validation fails")
    assert all(torch.equal(before, after) for before, after in zip(own, model.parameters(), strict=True))


def test_the_average_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4))
    whole, part = WeightAverage([weight], 0.9), WeightAverage([weight], 0.9)
    whole.update()
    part.update()
    weight.data.add_(1)
    resumed = WeightAverage([weight], 0.9)
    resumed.load_state_dict(part.state_dict())
    weight.data.mul_(3)
    whole.update()
    resumed.update()
    assert torch.equal(whole.state_dict()["averages"][0], resumed.state_dict()["averages"][0])
