"""Helps Pillow to decode PNG files with damaged or long text, and 16-bit files with a transparent color."""

import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import PngImagePlugin

__all__ = ["find_transparent_pixels", "remove_text"]

_SIGNATURE_BYTES = 8
_TEXT = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}


def remove_text(content: bytes) -> bytes | None:
    """Returns a PNG file without its text and color profile, or None if it has neither.

    Pillow rejects a file if its text or color profile has a wrong checksum, or is larger than 1 MB when decompressed.
    """
    chunks = list(_split_chunks(content))
    kept = [chunk for name, chunk in chunks if name not in _TEXT]
    return b"".join([content[:_SIGNATURE_BYTES], *kept]) if len(kept) < len(chunks) else None


def find_transparent_pixels(content: bytes, image: PngImagePlugin.PngImageFile) -> npt.NDArray[np.bool_] | None:
    """Returns which pixels have the color that a PNG with 16 bits per channel declares transparent; None without one.

    Pillow loads only the high byte of each channel, but several colors may have the same high bytes.
    """
    if image.mode != "RGB" or "transparency" not in image.info or image.tile[0].args != "RGB;16B":
        return None
    color = np.array(image.info["transparency"])
    matches = []
    for raw_mode, byte in (("RGB;16B", color >> 8), ("RGB;16L", color & 255)):  # high bytes, then low bytes
        with PngImagePlugin.PngImageFile(io.BytesIO(content)) as part:
            part.tile = [tile._replace(args=raw_mode) for tile in part.tile]
            matches.append((np.asarray(part) == byte).all(axis=2))
    found: npt.NDArray[np.bool_] = matches[0] & matches[1]
    return found


def _split_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the name of each chunk, and its bytes including its length and checksum."""
    position = _SIGNATURE_BYTES
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position:end]
        position = end
