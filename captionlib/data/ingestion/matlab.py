"""Reads columns of matrices in MATLAB files: up to version 7 through SciPy, version 7.3 through h5py."""

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
_HDF5_OFFSET = 512  # MATLAB writes its own header first


@dataclass(frozen=True)
class Matrix:
    """A matrix in an open file.

    Attributes:
        rows: the number of rows.
        columns: the number of columns.
        read_columns: takes ascending column numbers and returns those columns as `[numbers, rows]`.
    """

    rows: int
    columns: int
    read_columns: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.floating]]


@contextmanager
def open_matrix(address: str, name: str) -> Iterator[Matrix]:
    """Opens a matrix of a MATLAB file. Matrices of version 7.3 are read in parts, others as a whole.

    Args:
        address: a path, or the URL of a file to download.
        name: the name of the variable.

    Raises:
        DatasetError: the file cannot be read, or has no numeric matrix of that name.
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
    except Exception as error:  # SciPy raises many types on damaged files
        raise DatasetError(f"{address} cannot be read as a MATLAB file: {error or repr(error)}") from error
    if values is None or not isinstance(values, np.ndarray):
        raise _matrix_error(address, name, f"the variables {', '.join(names)}" if values is None else "another type")
    _check_matrix(values, address, name)
    yield Matrix(values.shape[0], values.shape[1], lambda numbers: values[:, numbers].T)


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
        # MATLAB stores columns contiguously, and HDF5 lists the axes in reverse order.
        yield Matrix(values.shape[1], values.shape[0], lambda numbers: _read_rows(values, numbers))


def _read_rows(values: Any, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
    """Reads rows of an HDF5 matrix: adjacent rows as a slice, since h5py reads a list row by row."""
    first, last = int(numbers[0]), int(numbers[-1])
    rows: npt.NDArray[np.floating] = values[first : last + 1] if last - first + 1 == len(numbers) else values[numbers]
    return rows


def _check_matrix(values: Any, address: str, name: str) -> None:
    if len(values.shape) != 2 or values.dtype.kind not in "fiu":
        raise _matrix_error(address, name, f"shape {list(values.shape)} and type {values.dtype}")


def _matrix_error(address: str, name: str, got: str) -> DatasetError:
    return DatasetError(f"{address}: expected a numeric matrix named {name}, got {got}")
