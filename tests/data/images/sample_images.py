"""Images for tests, made on the spot."""

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from captionlib.data.images.decoding import Preprocessing

PREPROCESSING = Preprocessing(48, 40, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def exactly(size: int) -> Preprocessing:
    """Leaves images of this size as they are."""
    return Preprocessing(size, size, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def photo(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Smooth colours, different in every corner."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour_type: int, rows: Iterable[bytes], *chunks: bytes) -> bytes:
    """A PNG of any kind, from rows of samples; a row is a filter byte, 0, and the samples."""
    compressor = zlib.compressobj(9)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = b"".join(compressor.compress(row) for row in rows) + compressor.flush()
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    )


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(values: npt.NDArray[Any], colour_type: int, *chunks: bytes) -> bytes:
    """A PNG of `[height, width, channels]` samples of 8 or 16 bits."""
    height, width = values.shape[:2]
    samples = values.astype(values.dtype.newbyteorder(">")).reshape(height, -1)
    rows = (b"\0" + row.tobytes() for row in samples)
    return png(width, height, values.dtype.itemsize * 8, colour_type, rows, *chunks)


def huge_png(side: int = 30_000) -> bytes:
    """One bit a pixel, all black: a file of some 100 kB that says it has `side` x `side` pixels, and has them."""
    row = bytes(1 + (side + 7) // 8)
    return png(side, side, 1, 0, (row for _ in range(side)))


def files() -> dict[str, bytes]:
    """The same photograph in every format, some in several ways."""
    image = photo()
    turned = image.rotate(180)
    return {
        "jpeg": saved(image, "JPEG", quality=90),
        "progressive jpeg": saved(image, "JPEG", progressive=True),
        "png": saved(image, "PNG"),
        "webp": saved(image, "WEBP"),
        "lossless webp": saved(image, "WEBP", lossless=True),
        "animated webp": saved(image, "WEBP", save_all=True, append_images=[turned], lossless=True),
        "gif": saved(image, "GIF"),
        "animated gif": saved(image, "GIF", save_all=True, append_images=[turned]),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF"),
        "lzw tiff": saved(image, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": saved(image, "TIFF", compression="jpeg"),
    }


def slow_jpeg(scans: int) -> bytes:
    """A small file that takes long to decode: about a millisecond for each of its scans, of 12 bytes."""
    content = saved(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last_scan * scans + content[-2:]
