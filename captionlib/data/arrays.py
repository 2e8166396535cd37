"""Converts between NumPy arrays and Arrow columns of fixed-size vectors."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["numpy_to_vectors", "vectors_to_numpy"]


def numpy_to_vectors(array: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    """Converts an array, `[rows, ...]`, to a column that has one flattened vector of the same dtype per row."""
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), math.prod(array.shape[1:]))


def vectors_to_numpy(
    column: pa.FixedSizeListArray | pa.ChunkedArray, shape: Sequence[int] | None = None
) -> npt.NDArray[np.floating]:
    """Converts a column of `fixed_size_list[size]` without nulls to an array, without copying where possible.

    Returns:
        `[rows, *shape]` with the column's dtype. If `shape` is None, `[rows, size]`.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values: npt.NDArray[np.floating] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), *(shape or [column.type.list_size]))
