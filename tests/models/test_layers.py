import torch

from captionlib.models.layers import Dropout


def test_training_drops_the_fraction_p_and_scales_the_rest():
    torch.manual_seed(0)
    outputs = Dropout(0.3)(torch.ones(1000, 100))
    assert set(outputs.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert abs((outputs == 0).float().mean() - 0.3) < 0.005


def test_gradients_are_zero_where_inputs_are_dropped():
    inputs = torch.ones(8, 8, dtype=torch.bfloat16, requires_grad=True)
    outputs = Dropout(0.5)(inputs)
    outputs.sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, outputs.detach())


def test_evaluation_changes_nothing():
    inputs = torch.randn(4, 4)
    assert torch.equal(Dropout(0.5).eval()(inputs), inputs)
