"""Encodes pixels as image files."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["encode_jpeg"]


def encode_jpeg(pixels: npt.NDArray[np.uint8], quality: int = 82) -> bytes:
    """Encodes RGB pixels, `[height, width, 3]`, as a JPEG file. `quality` ranges from 1 to 95."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
