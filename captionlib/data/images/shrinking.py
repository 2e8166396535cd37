"""Shrinks large images with NumPy, twice as fast as Pillow.

The filter is Pillow's bilinear filter with antialiasing. Values differ from Pillow's by at most 1, because Pillow
rounds after each of two passes, and this module rounds only once.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["shrink_image"]

_CHUNK = 8  # result rows whose pixels are converted to float32 together, so that the CPU's cache holds them


def shrink_image(
    pixels: npt.NDArray[np.uint8], size: tuple[int, int], box: tuple[float, float, float, float]
) -> npt.NDArray[np.uint8]:
    """Shrinks the part of an image inside a box.

    Args:
        pixels: `[height, width, channels]`, contiguous.
        size: width and height of the result, at most those of the box.
        box: left, upper, right and lower edge, in pixels.

    Returns:
        `[height, width, channels] uint8`.
    """
    image_height, image_width, channels = pixels.shape
    (width, height), (left, upper, right, lower) = size, box
    support = (right - left) / width  # radius of the filter, in pixels
    first, last = max(int(left - support), 0), min(int(right + support) + 1, image_width)
    rows = pixels.reshape(image_height, -1)[:, channels * first : channels * last]
    shrunk = _shrink_rows(rows, height, upper, lower).reshape(height, -1, channels)
    columns = shrunk.transpose(1, 2, 0).reshape(-1, channels * height)
    shrunk = _shrink_rows(columns, width, left - first, right - first)
    shrunk += 0.5  # astype truncates
    return np.ascontiguousarray(shrunk.astype(np.uint8).reshape(width, channels, height).transpose(2, 0, 1))


def _shrink_rows(rows: npt.NDArray[np.generic], count: int, start: float, end: float) -> npt.NDArray[np.float32]:
    """Shrinks rows between `start` and `end`, `[rows, values]`, to `count` weighted means, `[count, values]`."""
    support = (end - start) / count
    centers = start + support * (np.arange(count) + 0.5)
    taps = min(int(2 * support) + 2, len(rows))
    first = np.clip((centers - support).astype(int), 0, len(rows) - taps)  # first input row of each weighted mean
    distances = np.abs(first[:, None] + np.arange(taps) + 0.5 - centers[:, None])
    weights = np.maximum(1 - distances / support, 0)  # triangle filter
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    result = np.empty((count, rows.shape[1]), np.float32)
    buffer = np.empty((int(_CHUNK * support) + taps, rows.shape[1]), np.float32)
    for begin in range(0, count, _CHUNK):
        chunk = range(begin, min(begin + _CHUNK, count))
        top, bottom = first[chunk[0]], first[chunk[-1]] + taps
        converted = buffer[: bottom - top]
        np.copyto(converted, rows[top:bottom], casting="unsafe")
        for index in chunk:
            offset = first[index] - top
            np.matmul(weights[index], converted[offset : offset + taps], out=result[index])
    return result
