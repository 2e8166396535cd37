"""Conversions between NumPy arrays and Arrow columns of fixed-size vectors."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["numpy_to_vectors", "vectors_to_numpy"]


def numpy_to_vectors(array: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    """Converts an array to a column with one vector per row.

    Args:
        array: `[rows, ...]`; the dimensions after the first are flattened.

    Returns:
        `fixed_size_list[size]` of the array's dtype, `size` being the product of those dimensions.
    """
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), math.prod(array.shape[1:]))


def vectors_to_numpy(
    column: pa.FixedSizeListArray | pa.ChunkedArray, shape: Sequence[int] | None = None
) -> npt.NDArray[np.floating]:
    """Converts a column of fixed-size vectors to an array, without copying where possible.

    Args:
        column: `fixed_size_list[size]` without nulls.
        shape: the shape of one row, with `size` elements; `[size]` by default.

    Returns:
        `[rows, *shape]` of the column's dtype.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    numbers: npt.NDArray[np.floating] = column.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(column), *(shape or [column.type.list_size]))
