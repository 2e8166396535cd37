import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from captionlib.data.arrays import numpy_to_vectors, vectors_to_numpy


@settings(deadline=None)
@given(arrays(np.float16, array_shapes(min_dims=2, max_dims=3), elements={"allow_nan": False}))
def test_vectors_round_trip(array: npt.NDArray[np.float16]) -> None:
    column = numpy_to_vectors(array)
    assert column.type == pa.list_(pa.float16(), int(np.prod(array.shape[1:])))
    np.testing.assert_array_equal(vectors_to_numpy(column, array.shape[1:]), array)


@pytest.mark.parametrize("rows", [0, 3])
def test_vectors_have_one_dimension_by_default(rows: int) -> None:
    column = numpy_to_vectors(np.zeros((rows, 2, 3), np.float32))
    assert vectors_to_numpy(column).shape == (rows, 6)


def test_slices_and_chunks_keep_their_rows() -> None:
    column = numpy_to_vectors(np.arange(8, dtype=np.float32).reshape(4, 2))
    np.testing.assert_array_equal(vectors_to_numpy(column[1:3]), [[2, 3], [4, 5]])
    chunked = pa.chunked_array([column[3:], column[:1]])
    np.testing.assert_array_equal(vectors_to_numpy(chunked), [[6, 7], [0, 1]])
