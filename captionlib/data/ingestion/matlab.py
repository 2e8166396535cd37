"""Matrices out of MATLAB files, a run of columns at a time: up to version 7 by SciPy, version 7.3 by h5py."""

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

_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_AT = 512  # MATLAB puts a header of its own before it


@dataclass(frozen=True)
class Matrix:
    """A matrix in a file.

    Attributes:
        rows: its height.
        columns: its width.
        read: columns by their numbers, which ascend, as `[numbers, rows]`.
    """

    rows: int
    columns: int
    read: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.floating]]


@contextmanager
def open_matrix(address: str, name: str) -> Iterator[Matrix]:
    """Opens a matrix of a MATLAB file. One of version 7.3 stays on the disk, others are held in memory.

    Args:
        address: a path, or an address, whose file is fetched first.
        name: the variable.

    Raises:
        DatasetError: the file cannot be read, or has no such matrix of numbers.
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
            start = file.read(_HDF5_AT + len(_HDF5))
        opened = _open_hdf5 if _HDF5 in (start[: len(_HDF5)], start[_HDF5_AT:]) else _open_scipy
        with opened(path, address, name) as matrix:
            yield matrix


@contextmanager
def _open_scipy(path: Path, address: str, name: str) -> Iterator[Matrix]:
    import scipy.io

    try:
        there = [found for found, _, _ in scipy.io.whosmat(path)]
        values = scipy.io.loadmat(path, variable_names=[name]).get(name)
    except Exception as error:  # on damaged files it raises whatever its parsing stumbles over
        raise DatasetError(f"{address} cannot be read as a MATLAB file: {error or repr(error)}") from error
    if values is None or not isinstance(values, np.ndarray):
        raise _no_matrix(address, name, "it is none" if values is not None else f"there are {', '.join(there)}")
    _check(values, address, name)
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
            raise _no_matrix(address, name, f"there are {', '.join(file)}" if values is None else "it is none")
        _check(values, address, name)
        # Columns lie one after the other in MATLAB, and HDF5 counts the axes the other way round.
        yield Matrix(values.shape[1], values.shape[0], lambda numbers: _read_rows(values, numbers))


def _read_rows(values: Any, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
    """Rows of an HDF5 matrix: at once where they follow each other, as a list of rows is read one by one."""
    first, last = int(numbers[0]), int(numbers[-1])
    rows: npt.NDArray[np.floating] = values[first : last + 1] if last - first + 1 == len(numbers) else values[numbers]
    return rows


def _check(values: Any, address: str, name: str) -> None:
    if len(values.shape) != 2 or values.dtype.kind not in "fiu":
        raise _no_matrix(address, name, f"its shape is {list(values.shape)}, its type {values.dtype}")


def _no_matrix(address: str, name: str, got: str) -> DatasetError:
    return DatasetError(f"{address}: expected a matrix of numbers named {name}, got none: {got}")
