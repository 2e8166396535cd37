"""Products with weights that stay as they are, laid out once for whatever multiplies fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Product"]

_MANY_ROWS = 32  # below it the copies of oneDNN's layout cost what they save


class Product(nn.Module):
    """x W^T + b with a snapshot of W and b.

    On a CPU oneDNN multiplies many rows of float32 by weights in a layout of its own; where PyTorch's BLAS does not use
    the whole width of the processor's vectors, that takes half the time.

    Args:
        weight: W, `[outputs, inputs]`.
        bias: b, `[outputs]`; None for none.
        dtype: what it computes in.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(dtype)
        self._transposed = weight.t().clone(memory_format=torch.contiguous_format)
        self._bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self._packed: Tensor | None = None
        self._packed_bias: Tensor | None = None
        if dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self._packed = weight.to_mkldnn()
            self._packed_bias = None if self._bias is None else self._bias.to_mkldnn()

    def forward(self, rows: Tensor) -> Tensor:
        """`[rows, inputs]` to `[rows, outputs]`."""
        if self._packed is None or len(rows) < _MANY_ROWS:
            return rows @ self._transposed if self._bias is None else torch.addmm(self._bias, rows, self._transposed)
        return F.linear(rows.to_mkldnn(), self._packed, self._packed_bias).to_dense()
