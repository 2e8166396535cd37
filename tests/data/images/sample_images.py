"""Generates images for tests."""

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


def keep_size(size: int) -> Preprocessing:
    """Returns preprocessing that keeps images of this size unchanged."""
    return Preprocessing(size, size, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def make_image(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Returns a smooth image with a different color in each corner."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, color_type: int, rows: Iterable[bytes], *chunks: bytes) -> bytes:
    """Builds a PNG of any kind from rows; a row is a filter byte, 0, and the samples."""
    compressor = zlib.compressobj(9)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    body = b"".join(compressor.compress(row) for row in rows) + compressor.flush()
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    )


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def encode_png(values: npt.NDArray[Any], color_type: int, *chunks: bytes) -> bytes:
    """Encodes `[height, width, channels]` samples of 8 or 16 bits as PNG."""
    height, width = values.shape[:2]
    samples = values.astype(values.dtype.newbyteorder(">")).reshape(height, -1)
    rows = (b"\0" + row.tobytes() for row in samples)
    return png(width, height, values.dtype.itemsize * 8, color_type, rows, *chunks)


def huge_png(side: int = 30_000) -> bytes:
    """Builds a black PNG of `side` x `side` pixels in about 100 kB, with one bit per pixel."""
    row = bytes(1 + (side + 7) // 8)
    return png(side, side, 1, 0, (row for _ in range(side)))


def make_files() -> dict[str, bytes]:
    """Encodes the same image in each format and in several variants."""
    image = make_image()
    turned = image.rotate(180)
    return {
        "jpeg": encode_image(image, "JPEG", quality=90),
        "progressive jpeg": encode_image(image, "JPEG", progressive=True),
        "png": encode_image(image, "PNG"),
        "webp": encode_image(image, "WEBP"),
        "lossless webp": encode_image(image, "WEBP", lossless=True),
        "animated webp": encode_image(image, "WEBP", save_all=True, append_images=[turned], lossless=True),
        "gif": encode_image(image, "GIF"),
        "animated gif": encode_image(image, "GIF", save_all=True, append_images=[turned]),
        "bmp": encode_image(image, "BMP"),
        "tiff": encode_image(image, "TIFF"),
        "lzw tiff": encode_image(image, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encode_image(image, "TIFF", compression="jpeg"),
    }


def slow_jpeg(scans: int) -> bytes:
    """Builds a small file that decodes slowly, about a millisecond per 12-byte scan."""
    content = encode_image(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last_scan * scans + content[-2:]
