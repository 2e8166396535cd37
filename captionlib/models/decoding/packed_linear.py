"""Linear layers with constant weights, in the memory layout that multiplies fastest."""

import torch
from torch import Tensor, nn

__all__ = ["PackedLinear"]

_MIN_PACKED_ROWS = 32  # with fewer rows oneDNN is not faster


class PackedLinear(nn.Module):
    """x W^T + b with a snapshot of W and b.

    On a CPU, oneDNN multiplies many rows of float32 by weights in its own layout. Where PyTorch's BLAS does not use the
    full width of the processor's vectors, that takes half the time. The operators are those of PyTorch's compiler: they
    keep rows and products in the ordinary layout, whose conversion would take a tenth of a beam search.

    Args:
        weight: W, `[outputs, inputs]`.
        bias: b, `[outputs]`; None adds nothing.
        dtype: of the computation.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(dtype)
        self._transposed = weight.t().clone(memory_format=torch.contiguous_format)
        self._bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self._packed: Tensor | None = None
        if dtype == torch.float32 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def forward(self, rows: Tensor) -> Tensor:
        """Computes `[rows, inputs]` to `[rows, outputs]`."""
        if self._packed is None or len(rows) < _MIN_PACKED_ROWS:
            return rows @ self._transposed if self._bias is None else torch.addmm(self._bias, rows, self._transposed)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return product
