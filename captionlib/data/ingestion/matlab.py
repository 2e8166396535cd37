"""Reads columns of matrices in MATLAB files, with SciPy up to version 7 and with h5py for version 7.3 (HDF5)."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
_MAX_COMPRESSION = 100  # zlib compresses zeros 1,000 times; real features, at most a few times
_SCIPY_TYPES = {"double": 8, "single": 4, "int64": 8, "uint64": 8, "int32": 4, "uint32": 4, "int16": 2, "uint16": 2} | {
    "int8": 1,
    "uint8": 1,
}


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

    with _raise_dataset_errors(address):
        variables = {variable: (shape, kind) for variable, shape, kind in scipy.io.whosmat(path)}
        if name not in variables:
            raise _matrix_error(address, name, f"the variables {', '.join(variables)}")
        shape, kind = variables[name]
        if kind not in _SCIPY_TYPES:
            raise _matrix_error(address, name, f"shape {list(shape)} and type {kind}")
        _check_size(shape, _SCIPY_TYPES[kind], path, address)
        values = scipy.io.loadmat(path, variable_names=[name])[name]
    _check_matrix(values, address, name)
    yield Matrix(values.shape[0], values.shape[1], lambda indices: values[:, indices].T)


@contextmanager
def _open_hdf5(path: Path, address: str, name: str) -> Iterator[Matrix]:
    import h5py

    with _raise_dataset_errors(address):
        file = h5py.File(path, "r")
    with file:
        with _raise_dataset_errors(address):
            link = file.get(name, getlink=True)
            if link is not None and not isinstance(link, h5py.HardLink):
                raise _matrix_error(address, name, "a link")
            values = file.get(name)
            if not isinstance(values, h5py.Dataset):
                got = f"the variables {', '.join(file)}" if values is None else "another type"
                raise _matrix_error(address, name, got)
            if values.is_virtual or values.external:
                raise _matrix_error(address, name, "one that is stored in other files")
            _check_matrix(values, address, name)
            _check_size(values.shape, values.dtype.itemsize, path, address)

        def read_columns(indices: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
            with _raise_dataset_errors(address):
                return _read_rows(values, indices)

        # MATLAB stores matrices by column, so that the HDF5 matrix is the transpose.
        yield Matrix(values.shape[1], values.shape[0], read_columns)


@contextmanager
def _raise_dataset_errors(address: str) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # SciPy and h5py raise various exceptions on damaged files
        raise DatasetError(f"{address} cannot be read as a MATLAB file: {error or repr(error)}") from error


def _read_rows(values: Any, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
    """Reads rows of an HDF5 matrix. Adjacent rows are read as a slice, since h5py reads a list of rows one by one."""
    first, last = int(indices[0]), int(indices[-1])
    rows: npt.NDArray[np.floating] = values[first : last + 1] if last - first + 1 == len(indices) else values[indices]
    return rows


def _check_matrix(values: Any, address: str, name: str) -> None:
    if len(values.shape) != 2 or values.dtype.kind not in "fiu":
        raise _matrix_error(address, name, f"shape {list(values.shape)} and type {values.dtype}")


def _check_size(shape: Sequence[int], item_bytes: int, path: Path, address: str) -> None:
    """Rejects matrices whose declared size has no relation to the size of the file, before memory is allocated."""
    declared, size = math.prod(map(int, shape)) * item_bytes, path.stat().st_size
    if declared > _MAX_COMPRESSION * size:
        raise DatasetError(
            f"{address}: expected a matrix of at most {_MAX_COMPRESSION} times the {size:,} bytes of the file, got "
            f"shape {list(shape)}, {declared:,} bytes; save it again without compression"
        )


def _matrix_error(address: str, name: str, got: str) -> DatasetError:
    return DatasetError(f"{address}: expected a numeric matrix named {name}, got {got}")
