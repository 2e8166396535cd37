"""Decodes and orients images, and resizes and crops them as the encoder (a torchvision network) expects.

The format is detected from the content, never from the file name. Embedded color profiles are ignored, because encoders
are trained on the stored pixel values. Decoder processes import this module, so it must not import large libraries.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import (  # noqa: F401  (importing plugins registers them; otherwise the first image imports all of them)
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from captionlib.data.images.formats import FORMATS, ImageFormat, find_format, find_unsupported_format
from captionlib.data.images.jpeg import append_end_marker, check_jpeg, decode_rgb_jpeg
from captionlib.data.images.jxl import read_jxl_size
from captionlib.data.images.png import find_transparent_pixels, remove_text
from captionlib.data.images.shrinking import shrink_image
from captionlib.errors import ConfigError, DecodeError

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    # Decoder processes use one thread each; more would use up their address space.
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
with suppress(ImportError):
    from pillow_jxl import JpegXLImagePlugin  # registers itself

    JpegXLImagePlugin.DECODE_THREADS = 0  # decodes in the calling thread

__all__ = [
    "MAX_IMAGE_PIXELS",
    "MAX_JPEG_SCANS",
    "DecodeScale",
    "DecodedImage",
    "Preprocessing",
    "SizeLimit",
    "decode_image",
    "list_decodable_formats",
    "out_of_memory",
]

MAX_IMAGE_PIXELS = 100_000_000
"""Default limit on width x height. It is checked before decoding, because a tiny file can expand to a huge image."""

MAX_JPEG_SCANS = 100
"""Default limit on the scans of a JPEG file. Ordinary progressive JPEG files have about ten scans."""

DecodeScale = Literal["exact", "fast"]

_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}

_RESAMPLING = {"nearest-exact": Image.Resampling.NEAREST} | {
    name.lower(): method for name, method in Image.Resampling.__members__.items()
}

_FAST_SCALE = 2  # with `fast`, the decoded image is at least this many times as large as the resized image

_NUMPY_MIN_REDUCTION = 3  # from this factor on, NumPy shrinks an image faster than Pillow

# An array is RGB, `[height, width, 3]`, if NumPy shrinks it, or RGBX, `[height, width, 4]`, if Pillow resizes it.
_Pixels: TypeAlias = Image.Image | npt.NDArray[np.uint8]

# Files with 32-bit gray values do not define white. White is the lowest of these levels that no value exceeds.
_INTEGER_WHITE_LEVELS = (2.0**8 - 1, 2.0**16 - 1, 2.0**32 - 1)
_FLOAT_WHITE_LEVELS = (1.0, 2.0**8 - 1, 2.0**16 - 1)  # if a value exceeds all of them, white is 1, as in ImageMagick

# For each EXIF orientation: the transposition that turns the stored image upright, and whether it swaps width and
# height, reverses the order of the columns of the stored image, and reverses the order of its rows.
_ORIENTATIONS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (Image.Transpose.ROTATE_180, False, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False, False),
    6: (Image.Transpose.ROTATE_270, True, False, True),
    7: (Image.Transpose.TRANSVERSE, True, True, True),
    8: (Image.Transpose.ROTATE_90, True, True, False),
}


@dataclass(frozen=True)
class Preprocessing:
    """How to convert an image to the input of an encoder, as in torchvision's `weights.transforms()`."""

    resize_size: int  # length of the shorter side after resizing, in pixels
    crop_size: int  # side of the square that is cropped from the center; smaller images are padded with black
    interpolation: str  # torchvision's name of the interpolation mode, such as `bilinear`; antialiasing is always on
    mean: tuple[float, ...]  # of each channel, for pixels in 0..1; the encoder normalizes its input
    std: tuple[float, ...]  # of each channel, for pixels in 0..1
    decode_scale: DecodeScale = "exact"  # with `fast`, a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size
    stretch: bool = False  # resize width and height to `resize_size`, which changes the proportions

    def __post_init__(self) -> None:
        for name in ("resize_size", "crop_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1 pixel, got {getattr(self, name)}")
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(f"interpolation: expected one of {', '.join(_RESAMPLING)}, got {self.interpolation!r}")

    @property
    def resampling(self) -> Image.Resampling:
        return _RESAMPLING[self.interpolation]

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height after resizing, with the same rounding as torchvision."""
        if self.stretch:
            return self.resize_size, self.resize_size
        short, long = sorted((width, height))
        longer = int(self.resize_size * long / short)
        return (self.resize_size, longer) if width <= height else (longer, self.resize_size)

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height of the result for an image of the given size."""
        return self.crop_size, self.crop_size


@dataclass(frozen=True)
class SizeLimit:
    """Preprocessing that only shrinks large images: for display, or for models that preprocess images themselves."""

    max_size: int  # of the longer side, in pixels
    resampling: ClassVar[Image.Resampling] = Image.Resampling.BILINEAR
    decode_scale: ClassVar[DecodeScale] = "exact"

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height of the result for an image of the given size."""
        scale = min(1.0, self.max_size / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    output_size = resized_size


@dataclass(frozen=True)
class DecodedImage:
    """The pixels of an image after preprocessing, and its size in the file, after the rotation in its EXIF data."""

    pixels: npt.NDArray[np.uint8]  # `[height, width, 3]`, RGB, read-only
    width: int
    height: int


def list_decodable_formats() -> list[ImageFormat]:
    """Returns the formats whose decoders are installed."""
    return [image_format for image_format in FORMATS if image_format.plugins[0] in Image.OPEN]


def decode_image(
    content: bytes,
    preprocessing: Preprocessing | SizeLimit,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_jpeg_scans: int = MAX_JPEG_SCANS,
    before_decoding: Callable[[int], None] = lambda pixels: None,
) -> DecodedImage:
    """Decodes, orients, resizes and crops an image.

    The pixels differ from the output of torchvision's transforms by at most 1, unless `decode_scale` is `fast`.

    Args:
        content: a file in one of `captionlib.data.images.formats.FORMATS`. Only the first frame or page is decoded.
        preprocessing: the sizes and the interpolation; `mean` and `std` are not applied.
        max_image_pixels: larger images are rejected before they are decoded.
        max_jpeg_scans: files with more scans are rejected before they are decoded.
        before_decoding: function that is called with the number of pixels, before they are decoded.

    Raises:
        DecodeError: the image cannot be decoded. The error's `reason` is Empty, NotAnImage, UnsupportedFormat,
            TooManyPixels, TooManyScans, Truncated, Corrupt or OutOfMemory.
    """
    image_format = find_format(content)
    if image_format is None:
        raise _explain_unknown(content)
    try:
        if image_format.name == "JPEG":
            check_jpeg(content, max_jpeg_scans)
        if image_format.name == "JPEG XL" and (size := read_jxl_size(content)):  # opening the file decodes it
            _check_pixels(size, max_image_pixels, "the image has")
            before_decoding(size[0] * size[1])
        plugins = [name for name in image_format.plugins if name in Image.OPEN]
        with Image.open(io.BytesIO(content), formats=plugins) as image:
            _check_pixels(image.size, max_image_pixels, "the image has")
            before_decoding(image.width * image.height)
            return _preprocess(content, image, preprocessing, max_image_pixels)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("TooManyPixels", "the image has more pixels than Pillow decodes") from error
    except MemoryError:
        raise out_of_memory() from None
    except Exception as error:  # codecs may raise any exception on damaged files
        repair = {"JPEG": append_end_marker, "PNG": remove_text}.get(image_format.name, lambda _: None)
        if (repaired := repair(content)) is not None:
            return decode_image(repaired, preprocessing, max_image_pixels, max_jpeg_scans, before_decoding)
        raise _explain(content, image_format, error) from error


def out_of_memory() -> DecodeError:
    return DecodeError("OutOfMemory", "decoding needs more memory than a decoder process may use")


def _check_pixels(size: tuple[int, int], limit: int, message_start: str) -> None:
    width, height = size
    if width * height > limit:
        raise DecodeError("TooManyPixels", f"{message_start} {width} x {height} pixels, more than the limit of {limit}")


def _preprocess(
    content: bytes, image: Image.Image, preprocessing: Preprocessing | SizeLimit, limit: int
) -> DecodedImage:
    """Loads, resizes, crops and orients an image. The rotation comes last, when the image is smallest."""
    pixels = _load(content, image, preprocessing)
    transposition, is_swapped, *is_reversed = _read_orientation(image)
    width, height = image.size[::-1] if is_swapped else image.size
    method, resized = preprocessing.resampling, preprocessing.resized_size(width, height)
    output_size = preprocessing.output_size(width, height)
    _check_pixels(resized, limit, f"an image of {width} x {height} pixels has, after resizing,")
    if method == Image.Resampling.NEAREST:  # resizing a part of the image may select different pixels
        pixels = _resize(pixels, resized[::-1] if is_swapped else resized, method, ((0, 1), (0, 1)))

    # The part of the resized image that the crop keeps, in pixels of the resized image.
    spans, offsets = [], []
    for length, crop in zip(resized, output_size, strict=True):
        start = round((length - crop) / 2) if length >= crop else -((crop - length) // 2)
        spans.append((max(start, 0), min(start + crop, length)))
        offsets.append(max(-start, 0))

    # The same part as fractions of the columns and rows of the stored image.
    parts = [(start / length, end / length) for (start, end), length in zip(spans, resized, strict=True)]
    kept_width, kept_height = (end - start for start, end in spans)
    if is_swapped:
        parts, (kept_width, kept_height) = parts[::-1], (kept_height, kept_width)
    parts = [
        (1 - end, 1 - start) if flag else (start, end) for (start, end), flag in zip(parts, is_reversed, strict=True)
    ]
    kept = _resize(pixels, (kept_width, kept_height), method, parts)
    if transposition is not None:
        kept = kept.transpose(transposition)
    if kept.mode != "RGB":
        kept = kept.convert("RGB")
    if kept.size != output_size:
        canvas = Image.new("RGB", output_size)
        canvas.paste(kept, (offsets[0], offsets[1]))
        kept = canvas
    return DecodedImage(np.asarray(kept), width, height)


def _load(content: bytes, image: Image.Image, preprocessing: Preprocessing | SizeLimit) -> _Pixels:
    if image.mode == "RGB" and isinstance(image, JpegImagePlugin.JpegImageFile):
        width, height = preprocessing.resized_size(*image.size)
        is_fast = preprocessing.decode_scale == "fast"
        min_size = (_FAST_SCALE * width, _FAST_SCALE * height) if is_fast else None
        is_bilinear = preprocessing.resampling == Image.Resampling.BILINEAR
        use_numpy = is_bilinear and min(image.width / width, image.height / height) >= _NUMPY_MIN_REDUCTION
        pixels = decode_rgb_jpeg(content, image.size, min_size, padded=not use_numpy)
        if pixels is not None:
            return pixels
    return _to_rgb(content, image)


def _resize(
    pixels: _Pixels, size: tuple[int, int], method: Image.Resampling, part: Sequence[tuple[float, float]]
) -> Image.Image:
    """Resizes a part of an image, given by fractions of its width and of its height."""
    width, height = pixels.size if isinstance(pixels, Image.Image) else pixels.shape[1::-1]
    (left, right), (top, bottom) = part
    box = (left * width, top * height, right * width, bottom * height)
    if not isinstance(pixels, Image.Image):
        if pixels.shape[2] == 3:
            return Image.fromarray(shrink_image(pixels, size, box))
        pixels = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
        pixels.im.setmode("RGB")  # RGB images also have an unused fourth channel; for RGBX, Pillow would resize it too
    return pixels.resize(size, method, box)


def _to_rgb(content: bytes, image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB or gray, and blends transparency with white."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(image))
    transparent = find_transparent_pixels(content, image) if isinstance(image, PngImagePlugin.PngImageFile) else None
    image.load()
    if transparent is not None:
        image.paste("white", mask=Image.fromarray(transparent))
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image)
        return background
    return image if image.mode in {"RGB", "L"} else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Converts gray values of more than 8 bits to `[height, width] uint8`; of 16 bits, to the high byte."""
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode.startswith("I;16"):
        bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        gray: npt.NDArray[np.uint8] = (values >> (bits - 8)).astype(np.uint8)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white; Pillow inverts only up to 8 bits
            gray = 255 - gray
    else:
        if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (32,) and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,):
            values = values.view(np.uint32)  # Pillow treats unsigned values as signed
        finite = np.nan_to_num(values.astype(np.float32), nan=0, posinf=np.inf, neginf=0)
        white = _find_white(finite, image)
        gray = (finite.clip(0, white) * np.float32(255 / white)).astype(np.uint8)
    if "transparency" in image.info:  # the gray value that a PNG declares transparent
        gray[values == image.info["transparency"]] = 255
    return gray


def _find_white(values: npt.NDArray[np.float32], image: Image.Image) -> float:
    if image.format == "PPM":  # Pillow scales the values to 16 bits
        return 2.0**16 - 1
    highest = float(values.max(where=np.isfinite(values), initial=0))
    levels = _FLOAT_WHITE_LEVELS if image.mode == "F" else _INTEGER_WHITE_LEVELS
    return next((level for level in levels if highest <= level), levels[0])


def _read_orientation(image: Image.Image) -> tuple[Image.Transpose | None, bool, bool, bool]:
    """Returns the orientation in the EXIF data; see `_ORIENTATIONS`. Unreadable EXIF data are ignored."""
    upright = (None, False, False, False)
    try:
        return _ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1), upright)
    except Exception:
        return upright


def _explain_unknown(content: bytes) -> DecodeError:
    if not content:
        return DecodeError("Empty", "the file is empty")
    known = ", ".join(image_format.name for image_format in FORMATS)
    if name := find_unsupported_format(content):
        return DecodeError("UnsupportedFormat", f"expected {known}, got {name}; convert the image")
    return DecodeError("NotAnImage", f"expected {known}, got a file in none of these formats")


def _explain(content: bytes, image_format: ImageFormat, error: Exception) -> DecodeError:
    """Describes an exception without quoting its message, which may contain bytes of the file."""
    name = image_format.name
    if image_format not in list_decodable_formats():
        return DecodeError(
            "UnsupportedFormat",
            f"{name} files need an extra package; run pip install 'captionlib[{image_format.extra}]'",
        )
    if "truncated" in str(error).lower() or _ends_early(content, name):
        return DecodeError("Truncated", f"expected a complete {name} file, got a truncated one; download it again")
    if isinstance(error, UnidentifiedImageError):
        if name == "TIFF" and (samples := _describe_tiff_samples(content)):
            return DecodeError("UnsupportedFormat", f"TIFF files with {samples} cannot be decoded; convert the image")
        return DecodeError("Corrupt", f"the file starts like a {name} file, but its header cannot be read")
    return DecodeError("Corrupt", f"expected a valid {name} file, got a damaged one ({type(error).__name__})")


def _describe_tiff_samples(content: bytes) -> str | None:
    """Returns a phrase such as `3 channels of 64-bit signed integers` for a TIFF file, or None if it is damaged."""
    kinds = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers"}
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if 43 in content[2:4] else 8])  # 43: BigTIFF
        file = io.BytesIO(content)
        file.seek(directory.next)
        directory.load(file)
        bits, kind = directory[TiffImagePlugin.BITSPERSAMPLE][0], directory.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
        return f"{directory.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)} channels of {bits}-bit {kinds[kind]}"
    except Exception:  # Pillow raises various exceptions on damaged files
        return None


def _ends_early(content: bytes, name: str) -> bool:
    """Returns whether a file lacks the end marker of its format, or is shorter than its header says."""
    if name == "WebP":
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if name == "TIFF":  # the offset of the image directory, which is usually at the end
        return int.from_bytes(content[4:8], "little" if content.startswith(b"I") else "big") >= len(content)
    return name in _END_MARKERS and _END_MARKERS[name] not in content
