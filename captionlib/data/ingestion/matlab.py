"""Reads columns of matrices in MATLAB files, with SciPy up to version 7 and with h5py for version 7.3 (HDF5)."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captionlib.data.sources.locations import locate
from captionlib.errors import DatasetError

__all__ = ["Matrix", "open_matrix"]

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HDF5_OFFSET = 512  # MATLAB writes its own header before the HDF5 data


@dataclass(frozen=True)
class Matrix:
    """A matrix in an open file.

    Attributes:
        rows: number of rows.
        columns: number of columns.
        read_columns: function that takes ascending column indices and returns an array `[indices, rows]`.
    """

    rows: int
    columns: int
    read_columns: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.floating]]


@contextmanager
def open_matrix(address: str, name: str) -> Iterator[Matrix]:
    """Opens a matrix of a MATLAB file. Matrices are read as a whole up to version 7, and in parts for version 7.3.

    Args:
        address: path, or URL of a file to download.
        name: variable name of the matrix.

    Raises:
        DatasetError: the file cannot be read, or has no numeric matrix with that name.
    """
    location = locate(address)
    if not location.fs.exists(location.path):
        raise DatasetError(f"{address} does not exist; expected a MATLAB file")
    with tempfile.TemporaryDirectory(prefix="captionlib-matlab-") as scratch:
        path = Path(location.path)
        if not location.is_local:
            path = Path(scratch) / "matrix.mat"
            with location.fs.open(location.path, "rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        with path.open("rb") as file:
            start = file.read(_HDF5_OFFSET + len(_HDF5_SIGNATURE))
        is_hdf5 = start.startswith(_HDF5_SIGNATURE) or start[_HDF5_OFFSET:] == _HDF5_SIGNATURE
        open_file = _open_hdf5 if is_hdf5 else _open_scipy
        with open_file(path, address, name) as matrix:
            yield matrix


@contextmanager
def _open_scipy(path: Path, address: str, name: str) -> Iterator[Matrix]:
    import scipy.io

    try:
        names = [variable for variable, _, _ in scipy.io.whosmat(path)]
        values = scipy.io.loadmat(path, variable_names=[name]).get(name)
    except Exception as error:  # SciPy raises various exceptions on damaged files
        raise DatasetError(f"{address} cannot be read as a MATLAB file: {error or repr(error)}") from error
    if values is None or not isinstance(values, np.ndarray):
        raise _matrix_error(address, name, f"the variables {', '.join(names)}" if values is None else "another type")
    _check_matrix(values, address, name)
    yield Matrix(values.shape[0], values.shape[1], lambda indices: values[:, indices].T)


@contextmanager
def _open_hdf5(path: Path, address: str, name: str) -> Iterator[Matrix]:
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{address} cannot be read as a MATLAB file: {error}") from error
    with file:
        values = file.get(name)
        if not isinstance(values, h5py.Dataset):
            raise _matrix_error(address, name, f"the variables {', '.join(file)}" if values is None else "another type")
        _check_matrix(values, address, name)
        # MATLAB stores matrices by column, so that the HDF5 matrix is the transpose.
        yield Matrix(values.shape[1], values.shape[0], lambda indices: _read_rows(values, indices))


def _read_rows(values: Any, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
    """Reads rows of an HDF5 matrix. Adjacent rows are read as a slice, since h5py reads a list of rows one by one."""
    first, last = int(indices[0]), int(indices[-1])
    rows: npt.NDArray[np.floating] = values[first : last + 1] if last - first + 1 == len(indices) else values[indices]
    return rows


def _check_matrix(values: Any, address: str, name: str) -> None:
    if len(values.shape) != 2 or values.dtype.kind not in "fiu":
        raise _matrix_error(address, name, f"shape {list(values.shape)} and type {values.dtype}")


def _matrix_error(address: str, name: str, got: str) -> DatasetError:
    return DatasetError(f"{address}: expected a numeric matrix named {name}, got {got}")
