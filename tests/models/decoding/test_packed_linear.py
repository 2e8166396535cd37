import pytest
import torch

from captionlib.models.decoding.incremental import PackedLinear


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 100])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_packed_linear_equals_linear(rows: int, biased: bool, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(70, 33, generator=generator) / 6, torch.randn(70, generator=generator)
    values = torch.randn(rows, 33, generator=generator)
    with torch.inference_mode():
        product = PackedLinear(weight, bias if biased else None, dtype)(values.to(dtype))
    assert product.dtype == dtype
    expected = torch.nn.functional.linear(values, weight, bias if biased else None)
    torch.testing.assert_close(product.float(), expected, rtol=tolerance, atol=tolerance)


def test_packed_linear_is_a_snapshot() -> None:
    weight, values = torch.ones(2, 3), torch.ones(40, 3)
    product = PackedLinear(weight, None, torch.float32)
    weight.zero_()
    assert (product(values) == 3).all()
    assert (product(values[:1]) == 3).all()
