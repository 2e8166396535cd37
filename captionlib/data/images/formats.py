"""Lists the image formats that can be decoded, and recognizes a format by the first bytes of a file."""

import re
from dataclasses import dataclass

__all__ = ["FORMATS", "IMAGE_EXTENSIONS", "ImageFormat", "find_format", "find_unsupported_format"]


@dataclass(frozen=True)
class ImageFormat:
    """A format of image files."""

    name: str
    signature: bytes  # regular expression that matches the first bytes of a file
    extensions: tuple[str, ...]  # in lower case
    plugins: tuple[str, ...]  # names of the Pillow plugins that decode the format
    extra: str | None = None  # the extra of captionlib that installs the decoder, if any


FORMATS = (
    ImageFormat("JPEG", rb"\xff\xd8\xff", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), ("JPEG", "MPO")),
    ImageFormat("PNG", rb"\x89PNG\r\n\x1a\n", (".png", ".apng"), ("PNG",)),
    ImageFormat("WebP", rb"RIFF....WEBP", (".webp",), ("WEBP",)),
    ImageFormat("GIF", rb"GIF8[79]a", (".gif",), ("GIF",)),
    ImageFormat("BMP", rb"BM", (".bmp", ".dib"), ("BMP",)),
    ImageFormat("TIFF", rb"II[*+]\0|MM\0[*+]", (".tif", ".tiff"), ("TIFF",)),
    ImageFormat("Netpbm", rb"P[1-6]\s", (".ppm", ".pgm", ".pbm", ".pnm"), ("PPM",)),
    ImageFormat("AVIF", rb"....ftypavi[fs]", (".avif",), ("AVIF",)),
    ImageFormat(
        "JPEG 2000",
        rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
        ("JPEG2000",),
    ),
    # The brand mif1 also occurs in AVIF files.
    ImageFormat("HEIF", rb"....ftyp(hei|hev|mif1|msf1)", (".heic", ".heif", ".hif"), ("HEIF", "AVIF"), extra="heif"),
    ImageFormat("JPEG XL", rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", (".jxl",), ("JXL",), extra="jxl"),
)

IMAGE_EXTENSIONS = frozenset(extension for image_format in FORMATS for extension in image_format.extensions)

_UNSUPPORTED = {"Photoshop": b"8BPS", "ICO": b"\0\0\1\0", "PDF": b"%PDF-", "SVG": b"<svg"}


def find_format(content: bytes) -> ImageFormat | None:
    """Returns the format of a file, or None if it is not in `FORMATS`."""
    return next((found for found in FORMATS if re.match(found.signature, content, re.DOTALL)), None)


def find_unsupported_format(content: bytes) -> str | None:
    """Returns the name of a known format that cannot be decoded, or None."""
    return next((name for name, start in _UNSUPPORTED.items() if content.startswith(start)), None)
