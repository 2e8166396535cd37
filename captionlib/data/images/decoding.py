"""Bytes to pixels: an image decoded as a viewer would show it, resized and cropped as the encoder was trained.

Which format it is, the content says, never the name. Decoder processes import this module: Pillow and numpy, no more.

Embedded colour profiles are not applied: networks are trained on pixels as they are stored.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import (  # the plugins register themselves; without them Pillow would import all it has, at the first image
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

__all__ = ["MAX_IMAGE_PIXELS", "Preprocessing", "decode_image"]

MAX_IMAGE_PIXELS = 100_000_000
"""Default limit of width x height, told from the header: a file of a few kB may claim to be any size."""

_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin, TiffImagePlugin)
_FORMATS = tuple(plugin.__name__.removeprefix("PIL.").removesuffix("ImagePlugin").upper() for plugin in _PLUGINS)

# How files begin, with `?` for any byte: of the formats that are decoded, and of others that are images too.
_SIGNATURES = {
    "JPEG": [b"\xff\xd8\xff"],
    "PNG": [b"\x89PNG\r\n\x1a\n"],
    "WebP": [b"RIFF????WEBP"],
    "GIF": [b"GIF87a", b"GIF89a"],
    "BMP": [b"BM"],
    "TIFF": [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"],
}
_OTHER_SIGNATURES = {
    "AVIF": [b"????ftypavif", b"????ftypavis"],
    "HEIF": [b"????ftyphei", b"????ftyphev", b"????ftypmif1", b"????ftypmsf1"],
    "JPEG 2000": [b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"],
    "JPEG XL": [b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"],
    "Photoshop": [b"8BPS"],
    "ICO": [b"\0\0\1\0"],
    "PDF": [b"%PDF-"],
    "SVG": [b"<svg"],
}

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}

# The widest of these that a 32-bit image's values need is taken as white; such files do not say what theirs is.
_WHITES = (1.0, 2.0**8 - 1, 2.0**16 - 1, 2.0**32 - 1)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of an encoder: what torchvision's `weights.transforms()` holds.

    Attributes:
        resize_size: pixels of the shorter side before the crop.
        crop_size: pixels of the sides of the square that is cut from the middle; beyond the image it is black.
        interpolation: torchvision's name of it, such as `bilinear`; always with antialiasing.
        mean: of each channel, in 0..1; subtracted where the encoder runs, as `std` is divided by.
        std: of each channel.
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


def decode_image(
    content: bytes, preprocessing: Preprocessing, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decodes, turns upright, resizes and crops an image: bit for bit what torchvision's preset makes of it.

    Args:
        content: a JPEG, PNG, WebP, GIF, BMP or TIFF file; of several frames or pages the first is taken.
        preprocessing: the sizes and the interpolation; `mean` and `std` are left to the encoder.
        max_image_pixels: larger images are refused before they are decoded.

    Returns:
        `[crop_size, crop_size, 3] uint8`, RGB, read-only.

    Raises:
        DecodeError: its reason is Empty, NotAnImage, UnsupportedFormat, TooManyPixels, Truncated, Corrupt or
            OutOfMemory.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_pixels(image.size, max_image_pixels, "the image has")
            image.load()
            return _resize_and_crop(_upright(_to_rgb(image), _orientation(image)), preprocessing, max_image_pixels)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("TooManyPixels", "the image has more pixels than Pillow decodes") from error
    except UnidentifiedImageError:
        raise _unidentified(content) from None
    except MemoryError:
        raise DecodeError("OutOfMemory", "decoding needs more memory than a decoder may take") from None
    except Exception as error:  # on damaged files the codecs raise whatever their parsing stumbles over
        raise _undecodable(content, error) from error


def _check_pixels(size: tuple[int, int], limit: int, what: str) -> None:
    width, height = size
    if width * height > limit:
        raise DecodeError("TooManyPixels", f"{what} {width} x {height} pixels, more than {limit} in all")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer on a white page shows it; 16 and 32 bits are scaled, not clipped."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image)
    return page


def _to_8_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey values of more bits to `[height, width] uint8`: the high byte of 16 bits, as Pillow does for colours."""
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode.startswith("I;16"):
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        grey: npt.NDArray[np.uint8] = (values >> (bits - 8)).astype(np.uint8)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is 0, which Pillow heeds up to 8 bits
            grey = 255 - grey
    else:
        numbers = np.nan_to_num(values.astype(np.float32), nan=0, posinf=0, neginf=0)
        highest = float(numbers.max())
        whites = _WHITES if image.mode == "F" else _WHITES[1:]
        white = next((white for white in whites if highest <= white), highest)
        grey = (numbers.clip(0, white) * np.float32(255 / white)).astype(np.uint8)
    if "transparency" in image.info:  # of a PNG: the one value that is not painted
        grey[values == image.info["transparency"]] = 255
    return grey


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How the image has to be turned; one whose EXIF cannot be read is shown as it lies, as viewers do."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing, limit: int) -> npt.NDArray[np.uint8]:
    """The shorter side to `resize_size`, then the middle; sizes and offsets are rounded as torchvision rounds them."""
    width, height = image.size
    short, long = sorted(image.size)
    longer = int(preprocessing.resize_size * long / short)
    size = (preprocessing.resize_size, longer) if width <= height else (longer, preprocessing.resize_size)
    _check_pixels(size, limit, f"an image of {width} x {height}, resized to its shorter side, has")
    image = image.resize(size, _RESAMPLING[preprocessing.interpolation])
    crop = preprocessing.crop_size
    left, top = (_middle(length, crop) for length in size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def _middle(length: int, crop: int) -> int:
    return round((length - crop) / 2) if length >= crop else -((crop - length) // 2)


def _unidentified(content: bytes) -> DecodeError:
    known = ", ".join(_SIGNATURES)
    if not content:
        return DecodeError("Empty", "the file is empty")
    if name := _find_signature(content, _SIGNATURES):
        reason = "Truncated" if _ends_early(content, name) else "Corrupt"
        return DecodeError(reason, f"the file begins like a {name}, but its header cannot be read")
    if name := _find_signature(content, _OTHER_SIGNATURES):
        return DecodeError("UnsupportedFormat", f"expected {known}, got {name}; convert the image")
    return DecodeError("NotAnImage", f"expected {known}, got a file that begins like none of them")


def _undecodable(content: bytes, error: Exception) -> DecodeError:
    """The failure of an image that its codec gave up. Codecs quote the file, so their message is not repeated."""
    name = _find_signature(content, _SIGNATURES)
    if "truncated" in str(error).lower() or _ends_early(content, name):
        return DecodeError("Truncated", f"expected a whole {name}, got one that ends early; get the file again")
    return DecodeError("Corrupt", f"expected a {name}, got one that is damaged ({type(error).__name__})")


def _ends_early(content: bytes, name: str | None) -> bool:
    """Whether a file lacks what its format has at its end, or says is there."""
    if name == "WebP":
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if name == "TIFF":  # its directory, which writers put last
        return int.from_bytes(content[4:8], "little" if content.startswith(b"I") else "big") >= len(content)
    return name in _ENDS and _ENDS[name] not in content


def _find_signature(content: bytes, signatures: dict[str, list[bytes]]) -> str | None:
    for name, starts in signatures.items():
        for start in starts:
            head = content[: len(start)]
            if len(head) == len(start) and all(a == b for a, b in zip(start, head, strict=True) if a != ord("?")):
                return name
    return None
