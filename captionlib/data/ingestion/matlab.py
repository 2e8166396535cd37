"""Reads matrices in MATLAB files. SciPy reads files of version 7 and earlier, and h5py those of version 7.3 (HDF5)."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt
import scipy.io

from captionlib.data.sources.locations import locate
from captionlib.errors import CaptionlibError, DatasetError, SubprocessError
from captionlib.isolation import ProcessLimits, run_isolated
from captionlib.storage.folders import scratch_folder
from captionlib.storage.retries import call_with_retries, convert_os_errors

__all__ = ["open_matrix"]

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HDF5_OFFSET = 512  # MATLAB writes its own header before the HDF5 data
_MAX_COMPRESSION = 100  # zlib compresses zeros by a factor of 1,000, but image features only by a small factor
_BASE_MEMORY_BYTES = 2**29
_MAX_MEMORY_BYTES = 10 * 2**30  # SciPy holds up to two copies of a matrix of up to 4 GiB, the limit of version 7
_BASE_TIMEOUT_SECONDS = 60.0
_MIN_BYTES_PER_SECOND = 2**20
_BLOCK_BYTES = 2**26
_SCIPY_TYPE_BYTES = {"double": 8, "single": 4} | {
    f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)
}


@contextmanager
def open_matrix(address: str, name: str) -> Iterator[npt.NDArray[Any]]:
    """Opens the variable `name` of a MATLAB file as an array `[rows, columns]`, mapped into memory.

    SciPy and HDF5 crash on some damaged files, so a child process copies the matrix to a temporary file.

    Raises:
        DatasetError: the file is damaged, or has no numeric matrix with that name.
        StorageError: the file cannot be read, or the temporary file cannot be written.
    """
    location = locate(address).require("a MATLAB file")
    with scratch_folder() as scratch:
        path = Path(location.path)
        if not location.is_local:
            path = scratch / "matrix.mat"
            call_with_retries(location.path, lambda: location.fs.get_file(location.path, str(path)))
        copy = scratch / "matrix"
        try:
            with run_isolated(
                partial(_copy_matrix, path, address, name, copy), _choose_limits(path, address)
            ) as output:
                columns, rows, dtype = json.load(output)
        except SubprocessError as error:
            raise DatasetError(
                f"{address} cannot be read as a MATLAB file: {error}; download or save it again"
            ) from error
        yield np.memmap(copy, dtype, "r", shape=(columns, rows)).T


def _choose_limits(path: Path, address: str) -> ProcessLimits:
    size = path.stat().st_size
    memory_bytes = min(_BASE_MEMORY_BYTES + 2 * _MAX_COMPRESSION * size, _MAX_MEMORY_BYTES)
    timeout_seconds = _BASE_TIMEOUT_SECONDS + size / _MIN_BYTES_PER_SECOND
    prefix, advice = f"{address} cannot be read as a MATLAB file", "save only the matrix, without compression"
    return ProcessLimits(
        memory_bytes,
        timeout_seconds,
        DatasetError(f"{prefix}: it needs more than {memory_bytes / 1e9:.3g} GB of memory; {advice}"),
        DatasetError(f"{prefix} in {timeout_seconds:.0f} seconds; {advice}"),
    )


def _copy_matrix(path: Path, address: str, name: str, copy: Path, sink: BinaryIO) -> None:
    """Writes a matrix column by column to the file `copy`, and [columns, rows, dtype] as JSON to `sink`."""
    with path.open("rb") as file:
        start = file.read(_HDF5_OFFSET + len(_HDF5_SIGNATURE))
    is_hdf5 = start.startswith(_HDF5_SIGNATURE) or start[_HDF5_OFFSET:] == _HDF5_SIGNATURE
    with (_open_hdf5 if is_hdf5 else _open_scipy)(path, address, name) as columns:
        step = max(1, _BLOCK_BYTES // (columns.shape[1] * columns.dtype.itemsize))
        with convert_os_errors(str(copy)), copy.open("wb") as file:
            for first in range(0, columns.shape[0], step):
                with _raise_dataset_errors(address):
                    block = np.ascontiguousarray(columns[first : first + step])
                file.write(block.data)
        sink.write(json.dumps([*columns.shape, columns.dtype.str]).encode())


@contextmanager
def _open_scipy(path: Path, address: str, name: str) -> Iterator[npt.NDArray[Any]]:
    """Reads a whole matrix and yields its transpose."""
    with _raise_dataset_errors(address):
        variables = {variable: (shape, kind) for variable, shape, kind in scipy.io.whosmat(path)}
        if name not in variables:
            raise _matrix_error(address, name, f"the variables {', '.join(variables)}")
        shape, kind = variables[name]
        if kind not in _SCIPY_TYPE_BYTES:
            raise _matrix_error(address, name, f"shape {list(shape)} and type {kind}")
        _check_size(shape, _SCIPY_TYPE_BYTES[kind], path, address)
        values = scipy.io.loadmat(path, variable_names=[name])[name]
        _check_matrix(values, address, name)
    yield values.T


@contextmanager
def _open_hdf5(path: Path, address: str, name: str) -> Iterator[Any]:
    """Opens a matrix without reading it, and yields its transpose, because MATLAB stores matrices by column."""
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
        yield values


@contextmanager
def _raise_dataset_errors(address: str) -> Iterator[None]:
    try:
        yield
    except CaptionlibError:
        raise
    except Exception as error:  # SciPy and h5py raise various exceptions on damaged files
        raise DatasetError(f"{address} cannot be read as a MATLAB file: {error or repr(error)}") from error


def _check_matrix(values: Any, address: str, name: str) -> None:
    if len(values.shape) != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise _matrix_error(address, name, f"shape {list(values.shape)} and type {values.dtype}")


def _check_size(shape: Sequence[int], item_bytes: int, path: Path, address: str) -> None:
    """Rejects matrices whose declared size is implausible for the size of the file, before memory is allocated."""
    declared, size = math.prod(map(int, shape)) * item_bytes, path.stat().st_size
    if declared > _MAX_COMPRESSION * size:
        raise DatasetError(
            f"{address}: expected a matrix of at most {_MAX_COMPRESSION * size:,} bytes ({_MAX_COMPRESSION} times the "
            f"size of the file), got shape {list(shape)}, {declared:,} bytes; save it again without compression"
        )


def _matrix_error(address: str, name: str, got: str) -> DatasetError:
    return DatasetError(f"{address}: expected a numeric matrix named {name}, got {got}")
