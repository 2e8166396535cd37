"""Decodes and orients images, and resizes and crops them as the encoder (a torchvision network) expects.

The format is detected from the content, never from the file name. Embedded color profiles are ignored, because encoders
are trained on the stored pixel values. Decoder processes import this module, so it needs only Pillow and NumPy.
"""

import io
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import (  # importing plugins registers them; otherwise Pillow imports all of its plugins at the first image
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from captionlib.errors import ConfigError, DecodeError

__all__ = ["MAX_IMAGE_PIXELS", "DecodedImage", "Preprocessing", "Shrinking", "decode_image"]

MAX_IMAGE_PIXELS = 100_000_000
"""Default limit on width x height. It is checked before decoding, because a tiny file can expand to a huge image."""

_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin, TiffImagePlugin)
_FORMATS = tuple(plugin.__name__.removeprefix("PIL.").removesuffix("ImagePlugin").upper() for plugin in _PLUGINS)

# Patterns that match the first bytes of files in supported and unsupported formats.
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WebP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
}
_OTHER_SIGNATURES = {
    "AVIF": rb"....ftypavi[fs]",
    "HEIF": rb"....ftyp(hei|hev|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a",
    "Photoshop": rb"8BPS",
    "ICO": rb"\x00\x00\x01\x00",
    "PDF": rb"%PDF-",
    "SVG": rb"<svg",
}

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}

_RESAMPLING = {"nearest-exact": Image.Resampling.NEAREST} | {
    name.lower(): method for name, method in Image.Resampling.__members__.items()
}

# Files with 32-bit gray values do not define white. The lowest of these levels that no value exceeds is used.
_WHITE_LEVELS = (1.0, 2.0**8 - 1, 2.0**16 - 1, 2.0**32 - 1)


@dataclass(frozen=True)
class Preprocessing:
    """How an image is converted to the input of an encoder, as in torchvision's `weights.transforms()`.

    Attributes:
        resize_size: length of the shorter side after resizing, in pixels.
        crop_size: side of the square that is cropped from the center, in pixels. Smaller images are padded with black.
        interpolation: torchvision's name of the interpolation mode, such as `bilinear`. Antialiasing is always on.
        mean: mean of each channel, for pixels in 0..1. The encoder normalizes its input with `mean` and `std`.
        std: standard deviation of each channel, for pixels in 0..1.
    """

    resize_size: int
    crop_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("resize_size", "crop_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1 pixel, got {getattr(self, name)}")
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(f"interpolation: expected one of {', '.join(_RESAMPLING)}, got {self.interpolation!r}")

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height of the result for an image of the given size."""
        return self.crop_size, self.crop_size


@dataclass(frozen=True)
class Shrinking:
    """Shrinks an image, without cropping it, for people to look at. Small images are not enlarged.

    Attributes:
        max_size: maximum length of the longer side, in pixels.
    """

    max_size: int

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height of the result for an image of the given size."""
        scale = min(1.0, self.max_size / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True)
class DecodedImage:
    """An image as the input of an encoder, or shrunk.

    Attributes:
        pixels: `[height, width, 3] uint8`, RGB, read-only, of the `output_size` of the preprocessing.
        width: width of the whole image before resizing, in pixels, after it is rotated as its EXIF data say.
        height: height of the whole image.
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int


def decode_image(
    content: bytes, preprocessing: Preprocessing | Shrinking, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> DecodedImage:
    """Decodes, orients, resizes and crops an image. The pixels equal the output of torchvision's transforms.

    Args:
        content: a JPEG, PNG, WebP, GIF, BMP or TIFF file. Only the first frame or page is decoded.
        preprocessing: the sizes and the interpolation; `mean` and `std` are not applied.
        max_image_pixels: limit on width x height. Larger images are rejected before they are decoded.

    Raises:
        DecodeError: the image cannot be decoded. Its reason is Empty, NotAnImage, UnsupportedFormat, TooManyPixels,
            Truncated, Corrupt or OutOfMemory.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_pixels(image.size, max_image_pixels, "the image has")
            image.load()
            upright = _orient(_to_rgb(image), image)
            if isinstance(preprocessing, Shrinking):
                pixels = _shrink(upright, preprocessing)
            else:
                pixels = _resize_and_crop(upright, preprocessing, max_image_pixels)
            return DecodedImage(pixels, *upright.size)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("TooManyPixels", "the image has more pixels than Pillow decodes") from error
    except UnidentifiedImageError:
        raise _explain_unidentified(content) from None
    except MemoryError:
        raise DecodeError("OutOfMemory", "decoding needs more memory than a decoder process may use") from None
    except Exception as error:  # codecs may raise any exception on damaged files
        raise _explain_undecodable(content, error) from error


def _check_pixels(size: tuple[int, int], limit: int, what: str) -> None:
    width, height = size
    if width * height > limit:
        raise DecodeError("TooManyPixels", f"{what} {width} x {height} pixels, more than the limit of {limit}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB and blends transparency with white. 16-bit and 32-bit values are scaled, not clipped."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    background = Image.new("RGB", image.size, "white")
    background.paste(image, mask=image)
    return background


def _to_8_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Converts gray values of more than 8 bits to `[height, width] uint8`.

    Of 16-bit values, the high byte is kept, as in Pillow's conversion of 16-bit colors.
    """
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode.startswith("I;16"):
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        gray: npt.NDArray[np.uint8] = (values >> (bits - 8)).astype(np.uint8)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white, which Pillow handles up to 8 bits
            gray = 255 - gray
    else:
        finite = np.nan_to_num(values.astype(np.float32), nan=0, posinf=0, neginf=0)
        highest = float(finite.max())
        levels = _WHITE_LEVELS if image.mode == "F" else _WHITE_LEVELS[1:]
        white = next((level for level in levels if highest <= level), highest)
        gray = (finite.clip(0, white) * np.float32(255 / white)).astype(np.uint8)
    if "transparency" in image.info:  # the gray value that a PNG declares transparent
        gray[values == image.info["transparency"]] = 255
    return gray


def _orient(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Rotates and flips `pixels` according to the EXIF data of `image`. Unreadable EXIF data are ignored."""
    transpositions = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        transposition = transpositions.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return pixels
    return pixels if transposition is None else pixels.transpose(transposition)


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing, limit: int) -> npt.NDArray[np.uint8]:
    """Resizes an image by its shorter side and crops the center, with the same rounding as torchvision."""
    width, height = image.size
    short, long = sorted(image.size)
    longer = int(preprocessing.resize_size * long / short)
    size = (preprocessing.resize_size, longer) if width <= height else (longer, preprocessing.resize_size)
    _check_pixels(size, limit, f"an image of {width} x {height} pixels has, after resizing,")
    image = image.resize(size, _RESAMPLING[preprocessing.interpolation])
    crop = preprocessing.crop_size
    left, top = (round((length - crop) / 2) if length >= crop else -((crop - length) // 2) for length in size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def _shrink(image: Image.Image, shrinking: Shrinking) -> npt.NDArray[np.uint8]:
    size = shrinking.output_size(*image.size)
    return np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))


def _explain_unidentified(content: bytes) -> DecodeError:
    known = ", ".join(_SIGNATURES)
    if not content:
        return DecodeError("Empty", "the file is empty")
    if name := _find_signature(content, _SIGNATURES):
        reason = "Truncated" if _ends_early(content, name) else "Corrupt"
        return DecodeError(reason, f"the file starts like a {name} file, but its header cannot be read")
    if name := _find_signature(content, _OTHER_SIGNATURES):
        return DecodeError("UnsupportedFormat", f"expected {known}, got {name}; convert the image")
    return DecodeError("NotAnImage", f"expected {known}, got a file in none of these formats")


def _explain_undecodable(content: bytes, error: Exception) -> DecodeError:
    """Describes a codec's exception without quoting its message, which may contain bytes of the file."""
    name = _find_signature(content, _SIGNATURES)
    if "truncated" in str(error).lower() or _ends_early(content, name):
        return DecodeError("Truncated", f"expected a complete {name} file, got a truncated one; download it again")
    return DecodeError("Corrupt", f"expected a valid {name} file, got a damaged one ({type(error).__name__})")


def _ends_early(content: bytes, name: str | None) -> bool:
    """Returns whether a file lacks the end marker of its format, or is shorter than its header says."""
    if name == "WebP":
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if name == "TIFF":  # the offset of the image directory, which is usually at the end
        return int.from_bytes(content[4:8], "little" if content.startswith(b"I") else "big") >= len(content)
    return name in _ENDS and _ENDS[name] not in content


def _find_signature(content: bytes, signatures: dict[str, bytes]) -> str | None:
    return next((name for name, start in signatures.items() if re.match(start, content, re.DOTALL)), None)
