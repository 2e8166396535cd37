import io
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageCms
from torchvision.models import EfficientNet_B0_Weights, VGG16_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.errors import ConfigError, DecodeError
from tests.data.images.sample_images import (
    PREPROCESSING,
    encode_image,
    encode_png,
    huge_png,
    keep_size,
    make_files,
    make_image,
    png,
    png_chunk,
    slow_jpeg,
)

SIDE = 16
WHOLE = keep_size(SIDE)

Pixels = npt.NDArray[np.uint8]


def decode(content: bytes, preprocessing: Preprocessing = WHOLE) -> Pixels:
    return decode_image(content, preprocessing).pixels


def square(mode: str, seed: int = 0) -> Image.Image:
    return make_image(SIDE, SIDE, seed).convert(mode)


def assert_close(decoded: Pixels, expected: Pixels, tolerance: int = 1) -> None:
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).max() <= tolerance


def colors(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def reason(content: bytes, preprocessing: Preprocessing = WHOLE, **limits: int) -> str:
    with pytest.raises(DecodeError) as caught:
        decode_image(content, preprocessing, **limits)
    assert str(caught.value)
    return caught.value.reason


def of_torchvision(image: Image.Image, preset: ImageClassification) -> Pixels:
    preset.mean, preset.std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    levels: torch.Tensor = preset(image) * 255
    return levels.round().byte().permute(1, 2, 0).numpy()


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    resize_size=st.integers(1, 80),
    crop_size=st.integers(1, 80),
    interpolation=st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic", "lanczos"]),
)
def test_decode_equals_torchvision_preset(
    width: int, height: int, resize_size: int, crop_size: int, interpolation: str
) -> None:
    image = make_image(width, height)
    ours = Preprocessing(resize_size, crop_size, interpolation, (0.0,) * 3, (1.0,) * 3)
    theirs = ImageClassification(
        crop_size=crop_size, resize_size=resize_size, interpolation=InterpolationMode(interpolation)
    )
    tolerances = {"nearest": 0, "nearest-exact": 0, "bilinear": 1}
    decoded = decode(encode_image(image, "PNG"), ours)
    assert decoded.shape == (crop_size, crop_size, 3)
    assert decoded.dtype == np.uint8
    assert_close(decoded, of_torchvision(image, theirs), tolerance=tolerances.get(interpolation, 2))


@pytest.mark.parametrize("weights", [VGG16_Weights.IMAGENET1K_V1, EfficientNet_B0_Weights.IMAGENET1K_V1])
@pytest.mark.parametrize("size", [(500, 375), (375, 501), (1024, 768), (1100, 1000), (224, 224), (31, 977)])
def test_decode_equals_weights_transforms_on_jpegs(weights: VGG16_Weights, size: tuple[int, int]) -> None:
    preset = weights.transforms()
    ours = Preprocessing(
        preset.resize_size[0], preset.crop_size[0], preset.interpolation.value, tuple(preset.mean), tuple(preset.std)
    )
    content = encode_image(make_image(*size), "JPEG", quality=85)
    expected = of_torchvision(Image.open(io.BytesIO(content)), preset)
    assert_close(decode(content, ours), expected, tolerance=1 if ours.interpolation == "bilinear" else 2)


@pytest.mark.parametrize("name", make_files())
def test_first_frame_of_each_format_is_decoded(name: str) -> None:
    difference = decode(make_files()[name], PREPROCESSING).astype(int) - decode(
        encode_image(make_image(), "PNG"), PREPROCESSING
    )
    assert np.abs(difference).mean() < 12  # palettes and quantization; another frame or channel order differs by 60


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["1", "L"])
def test_grayscale_has_three_equal_channels(mode: str, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    decoded = decode(encode_image(square(mode), kind, **options)).astype(int)
    assert np.abs(decoded - colors(square(mode))).max() <= (12 if kind == "JPEG" else 0)
    assert np.ptp(decoded, axis=2).max() == 0


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_palettes_are_resolved(kind: str) -> None:
    image = square("RGB").quantize(8)
    np.testing.assert_array_equal(decode(encode_image(image, kind)), colors(image))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(kind: str) -> None:
    image = square("RGB").quantize(8)
    entry = int(np.asarray(image)[0, 0])
    expected = colors(image).copy()
    expected[np.asarray(image) == entry] = 255
    np.testing.assert_array_equal(decode(encode_image(image, kind, transparency=entry)), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_blended_with_white(kind: str) -> None:
    image = square("RGBA")
    alpha = np.linspace(0, 255, SIDE * SIDE).astype(np.uint8).reshape(SIDE, SIDE)
    image.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    expected = colors(square("RGB")) * share + 255 * (1 - share)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.abs(decode(encode_image(image, kind, **options)) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_with_alpha_is_blended_with_white(kind: str) -> None:
    image = Image.merge("LA", [Image.new("L", (SIDE, SIDE), 100), Image.new("L", (SIDE, SIDE), 51)])
    assert np.unique(decode(encode_image(image, kind))).tolist() == [224]  # 100 x 0.2 + 255 x 0.8


def test_transparent_color_is_white() -> None:
    image = Image.new("RGB", (SIDE, SIDE), (10, 20, 30))
    image.putpixel((3, 5), (40, 50, 60))
    decoded = decode(encode_image(image, "PNG", transparency=(10, 20, 30)))
    assert decoded[5, 3].tolist() == [40, 50, 60]
    assert decoded[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_not_inverted(kind: str) -> None:
    """JPEGs of Adobe and Pillow store inverted CMYK."""
    cyan = Image.new("CMYK", (SIDE, SIDE), (255, 0, 0, 0))
    options = {"quality": 100} if kind == "JPEG" else {}
    assert np.abs(decode(encode_image(cyan, kind, **options)).astype(int) - [0, 255, 255]).max() <= 3
    black = Image.new("CMYK", (SIDE, SIDE), (0, 0, 0, 255))
    assert decode(encode_image(black, kind, **options)).max() <= 3


def ramp(bits: int) -> npt.NDArray[np.uint16]:
    """Returns `[16, 16]` values from black to nearly white, 17 8-bit steps per row."""
    return (np.arange(256, dtype=np.uint16) << (bits - 8)).reshape(SIDE, SIDE)


def expected_ramp() -> Pixels:
    return np.repeat(np.arange(256, dtype=np.uint8).reshape(SIDE, SIDE, 1), 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(kind: str) -> None:
    np.testing.assert_array_equal(decode(encode_image(Image.fromarray(ramp(16)), kind)), expected_ramp())
    full = Image.fromarray(ramp(16) * np.uint16(1) + np.arange(256, dtype=np.uint16).reshape(SIDE, SIDE))
    np.testing.assert_array_equal(decode(encode_image(full, kind)), expected_ramp())


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_16_bit_tiff_byte_orders_and_polarities_are_scaled(order: str, white_is_zero: bool) -> None:
    content = tiff(ramp(16).astype(f"{order}u2").tobytes(), bits=16, order=order, photometric=int(not white_is_zero))
    expected = 255 - expected_ramp() if white_is_zero else expected_ramp()
    if white_is_zero and order == ">":
        pytest.skip("Pillow does not read it")
    np.testing.assert_array_equal(decode(content), expected)


def test_12_bit_gray_is_scaled() -> None:
    pairs = ramp(12).reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    content = tiff(packed.astype(np.uint8).tobytes(), bits=12, order="<", photometric=1)
    np.testing.assert_array_equal(decode(content), expected_ramp())


def tiff(samples: bytes, bits: int, order: str, photometric: int) -> bytes:
    """A greyscale TIFF in one strip."""
    entries = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, SIDE)]
    entries.append((279, len(samples)))
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in entries
    )
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}I", 8 + len(samples)) + samples + directory + bytes(4)


def test_16_bit_color_is_scaled() -> None:
    values = np.repeat(ramp(16)[..., None], 3, axis=2)
    values[..., 2] = 0
    expected = expected_ramp()
    expected[..., 2] = 0
    np.testing.assert_array_equal(decode(encode_png(values, 2)), expected)


def test_16_bit_alpha_is_blended_with_white() -> None:
    grey_and_alpha = np.full((SIDE, SIDE, 2), [100 << 8, 51 << 8], np.uint16)
    assert np.unique(decode(encode_png(grey_and_alpha, 4))).tolist() == [224]


def test_16_bit_transparent_color_is_white() -> None:
    """Only the pixel whose color equals in all 16 bits is transparent."""
    values = np.full((SIDE, SIDE, 3), [0x0102, 0x0304, 0x0506], np.uint16)
    values[0, 0], values[2, 1] = [0x0102, 0x0304, 0x0507], [0x0103, 0x0304, 0x0506]
    content = encode_png(values, 2, png_chunk(b"tRNS", struct.pack(">3H", 0x0102, 0x0304, 0x0506)))
    expected = np.full((SIDE, SIDE, 3), 255)
    expected[0, 0] = expected[2, 1] = [1, 3, 5]
    np.testing.assert_array_equal(decode(content), expected)


def test_16_bit_transparent_value_is_white() -> None:
    content = encode_png(ramp(16)[..., None], 0, png_chunk(b"tRNS", struct.pack(">H", 0x0300)))
    expected = expected_ramp()
    expected[0, 3] = 255
    np.testing.assert_array_equal(decode(content), expected)


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_white_level(white: float) -> None:
    values = np.linspace(0, white, 256, dtype=np.float32).reshape(SIDE, SIDE)
    decoded = decode(encode_image(Image.fromarray(values), "TIFF")).astype(int)
    assert np.abs(decoded - expected_ramp()).max() <= 1
    values[0, :3] = np.nan, np.inf, -np.inf
    special = decode(encode_image(Image.fromarray(values), "TIFF"))
    assert special[0, :3, 0].tolist() == [0, 255, 0]  # as ImageMagick
    np.testing.assert_array_equal(special[1:], decoded[1:])


def test_floats_above_all_white_levels_are_clipped_at_one() -> None:
    values = np.full((SIDE, SIDE), 0.5, np.float32)
    values[0, 0] = 1e30
    decoded = decode(encode_image(Image.fromarray(values), "TIFF"))
    assert decoded[0, 0, 0] == 255
    assert decoded[1, 1, 0] == 127


def test_unsigned_32_bit_integers_above_the_signed_range_are_scaled() -> None:
    values = (np.arange(256, dtype=np.uint32) << 24).reshape(SIDE, SIDE)
    content = tiff(values.tobytes(), bits=32, order="<", photometric=1)
    assert np.abs(decode(content).astype(int) - expected_ramp()).max() <= 1
    assert decode(content)[0, 0, 0] == 0


def test_32_bit_integers_are_scaled_by_white_level() -> None:
    assert decode(encode_image(Image.fromarray(ramp(16).astype(np.int32)), "TIFF")).max() == 254
    assert decode(encode_image(Image.fromarray(ramp(8).astype(np.int32)), "TIFF")).max() == 255


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode_image(make_image(), kind, exif=exif, **options)
    stored = np.asarray(Image.open(io.BytesIO(encode_image(make_image(), kind, **options))).convert("RGB"))
    upright = Image.fromarray(np.ascontiguousarray(TURNED[orientation](stored)))
    assert_close(decode(content, PREPROCESSING), decode(encode_image(upright, "PNG"), PREPROCESSING))


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_of_large_images_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode_image(make_image(300, 200), "JPEG", exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(content)))
    upright = Image.fromarray(np.ascontiguousarray(TURNED[orientation](stored)))
    assert_close(decode(content, PREPROCESSING), decode(encode_image(upright, "PNG"), PREPROCESSING))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0"])
def test_unreadable_exif_is_ignored(exif: bytes) -> None:
    np.testing.assert_array_equal(
        decode(encode_image(make_image(), "JPEG", exif=exif), PREPROCESSING),
        decode(encode_image(make_image(), "JPEG"), PREPROCESSING),
    )


@pytest.mark.parametrize("orientation", TURNED)
def test_width_and_height_are_those_of_the_upright_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode_image(make_image(90, 60), "JPEG", exif=exif), PREPROCESSING)
    assert (decoded.width, decoded.height) == ((60, 90) if orientation >= 5 else (90, 60))


def test_color_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    content = encode_image(square("RGB"), "PNG", icc_profile=profile)
    np.testing.assert_array_equal(decode(content), colors(square("RGB")))


def test_images_with_too_many_pixels_are_rejected() -> None:
    content = encode_image(make_image(90, 60), "PNG")
    assert decode_image(content, WHOLE, max_image_pixels=5400).pixels.shape == (SIDE, SIDE, 3)
    assert reason(content, max_image_pixels=5399) == "TooManyPixels"
    assert reason(huge_png()) == "TooManyPixels"


def test_images_that_are_too_large_after_resizing_are_rejected() -> None:
    content = encode_image(make_image(1, 20_000), "PNG")
    assert reason(content, max_image_pixels=1_000_000) == "TooManyPixels"


@pytest.mark.parametrize("name", make_files())
def test_truncated_files_are_rejected(name: str) -> None:
    content = make_files()[name]
    seen = set()
    last = 0
    for length in range(1, len(content), max(1, len(content) // 60)):
        try:
            decode(content[:length], PREPROCESSING)
            last = last or length
        except DecodeError as error:
            assert not last, "a longer piece of the file was an image"
            seen.add(error.reason)
    assert "Truncated" in seen
    assert seen <= {
        "Truncated",
        "Corrupt",
        "NotAnImage",
    }  # the first byte alone is not an image; some formats have checksums
    assert last == 0 or last > len(content) * 0.4  # the second frame is not needed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "Empty"),
        (b"Dear reader,\n", "NotAnImage"),
        (b"<!DOCTYPE html><html></html>", "NotAnImage"),
        (bytes(1000), "NotAnImage"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "Truncated"),
        (b"BM" + bytes(100), "Corrupt"),
        (b"%PDF-1.4", "UnsupportedFormat"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "UnsupportedFormat"),
        (encode_image(make_image(), "ICO"), "UnsupportedFormat"),
    ],
)
def test_other_content_is_rejected_with_a_reason(content: bytes, expected: str) -> None:
    assert reason(content) == expected


@pytest.mark.parametrize(
    "content",
    [
        b"root:x:0:0:root:/root",
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\4root" * 9,
        png(SIDE, SIDE, 8, 0, [bytes(SIDE + 1)] * SIDE).replace(b"IDAT", b"root"),
        b"BMroot" + b"root" * 20,
        b"II*\0\x08\0\0\0" + b"root" * 20,
        b"GIF89a" + b"root" * 20,
        b"\xff\xd8\xff\xe0" + b"root" * 20,
        b"RIFFrootWEBP" + b"root" * 20,
        b"%PDF-root",
    ],
)
def test_failures_quote_no_content(content: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(content)
    assert "root" not in str(caught.value)


def jpeg_frame(process: int, bits: int = 8) -> bytes:
    frame = struct.pack(">BBHHB", bits, 0, 16, 16, 1)[:1] + struct.pack(">HHB", 16, 16, 1) + b"\1\x11\0"
    return (
        b"\xff\xd8\xff" + bytes([process]) + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\0\x08" + bytes(50)
    )


def tiff_of(values: npt.NDArray[Any]) -> bytes:
    """Returns a TIFF file without compression and with any kind of samples."""
    samples = values.shape[2] if values.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits = values.dtype.itemsize * 8
    entries = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, 2 if samples == 3 else 1), (273, 8)]
    entries += [(277, samples), (278, SIDE), (279, values.nbytes), (339, kind)]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries
    )
    return b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + directory + bytes(4)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (jpeg_frame(0xC1, bits=12), "12 bits"),
        (jpeg_frame(0xC3), "lossless JPEG"),
        (jpeg_frame(0xC5), "hierarchical JPEG"),
        (jpeg_frame(0xF7), "JPEG-LS"),
        (tiff_of(np.zeros((SIDE, SIDE), np.float64)), "64-bit floating-point"),
        (tiff_of(np.zeros((SIDE, SIDE, 3), np.float32)), "32-bit floating-point"),
        (tiff_of(np.zeros((SIDE, SIDE, 3), np.uint32)), "32-bit unsigned"),
    ],
)
def test_unsupported_kinds_of_pixels_are_named(content: bytes, named: str) -> None:
    with pytest.raises(DecodeError, match=named) as caught:
        decode(content)
    assert caught.value.reason == "UnsupportedFormat"


@pytest.mark.parametrize("kind", ["PPM", "AVIF", "JPEG2000", "MPO"])
def test_further_formats_are_decoded(kind: str) -> None:
    options = {"save_all": True, "append_images": [make_image(seed=1)]} if kind == "MPO" else {}
    decoded = decode(encode_image(make_image(), kind, **options), PREPROCESSING)
    difference = decoded.astype(int) - decode(encode_image(make_image(), "PNG"), PREPROCESSING)
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize(("package", "kind", "extra"), [("pillow_heif", "HEIF", "heif"), ("pillow_jxl", "JXL", "jxl")])
def test_formats_of_extras_are_decoded_or_name_the_extra(
    package: str, kind: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    content = encode_image(make_image(), kind, quality=90)
    difference = decode(content, PREPROCESSING).astype(int) - decode(encode_image(make_image(), "PNG"), PREPROCESSING)
    assert np.abs(difference).mean() < 6
    monkeypatch.delitem(Image.OPEN, kind)
    with pytest.raises(DecodeError, match=rf"captionlib\[{extra}\]") as caught:
        decode(content)
    assert caught.value.reason == "UnsupportedFormat"


@pytest.mark.parametrize(("package", "kind"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL"), ("PIL", "AVIF")])
def test_orientation_of_further_formats_is_applied_once(package: str, kind: str) -> None:
    pytest.importorskip(package)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode_image(make_image(), kind, exif=exif.tobytes(), quality=95)
    decoded = decode_image(content, PREPROCESSING)
    assert (decoded.width, decoded.height) == (60, 90)
    upright = decode(encode_image(make_image().transpose(Image.Transpose.ROTATE_270), "PNG"), PREPROCESSING)
    assert np.abs(decoded.pixels.astype(int) - upright).mean() < 6


def test_dark_netpbm_files_of_16_bits_are_not_brightened() -> None:
    content = b"P5 16 16 65535\n" + np.full((SIDE, SIDE), 200, ">u2").tobytes()
    assert decode(content).max() == 0


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_that_lacks_only_its_end_marker_is_decoded(mode: str, progressive: bool) -> None:
    content = encode_image(make_image().convert(mode), "JPEG", progressive=progressive)
    np.testing.assert_array_equal(decode(content[:-2], PREPROCESSING), decode(content, PREPROCESSING))
    assert reason(content[:-4], PREPROCESSING) == "Truncated"


def test_progressive_jpeg_that_lacks_a_scan_is_rejected() -> None:
    content = encode_image(make_image(), "JPEG", progressive=True)
    assert reason(content[: content.rindex(b"\xff\xda")], PREPROCESSING) == "Truncated"


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000),
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2_000_000)),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
        png_chunk(b"iCCP", b"Profile\0\0" + zlib.compress(bytes(2_000_000))),
        png_chunk(b"tEXt", b"Comment\0wrong checksum")[:-1] + b"?",
    ],
    ids=["tEXt", "zTXt", "iTXt", "iCCP", "checksum"],
)
def test_png_with_large_or_damaged_text_is_decoded(chunk: bytes) -> None:
    values = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)
    np.testing.assert_array_equal(decode(encode_png(values, 2, chunk)), values)


def test_jpeg_with_too_many_scans_is_rejected_before_decoding() -> None:
    slow = slow_jpeg(200)
    assert reason(slow) == "TooManyScans"
    second_scan = slow.index(b"\xff\xda", slow.index(b"\xff\xda") + 2)
    assert reason(slow[:second_scan] + b"\xff\1" + slow[second_scan:]) == "TooManyScans"  # this marker has no length
    image = encode_image(make_image(), "JPEG", comment=b"\xff\xda" * 200)  # a comment is not a scan
    np.testing.assert_array_equal(decode(image + b"\xff\xda" * 200), decode(encode_image(make_image(), "JPEG")))


def test_sequential_jpeg_with_too_many_scans_is_rejected_before_decoding() -> None:
    content = encode_image(make_image(), "JPEG")
    start = content.index(b"\xff\xda")
    of_one_component = content[start:-2].replace(b"\0\x0c\3\1\0\2\x11\3\x11", b"\0\x08\1\1\0", 1)
    assert reason(content[:start] + of_one_component * 200 + b"\xff\xd9") == "TooManyScans"


def test_fast_scale_differs_little_and_reads_other_formats_exactly() -> None:
    fast = replace(PREPROCESSING, decode_scale="fast")
    image = make_image(900, 600)
    jpeg, png_file = encode_image(image, "JPEG", quality=90), encode_image(image, "PNG")
    assert not np.array_equal(decode(jpeg, fast), decode(jpeg, PREPROCESSING))
    assert_close(decode(jpeg, fast), decode(jpeg, PREPROCESSING), tolerance=4)
    np.testing.assert_array_equal(decode(png_file, fast), decode(png_file, PREPROCESSING))
    decoded = decode_image(jpeg, fast)
    assert (decoded.width, decoded.height) == (900, 600)


def test_fast_scale_keeps_small_images() -> None:
    content = encode_image(make_image(100, 90), "JPEG")  # half of it is less than twice the resized image
    np.testing.assert_array_equal(
        decode(content, replace(PREPROCESSING, decode_scale="fast")), decode(content, PREPROCESSING)
    )


def test_wrong_checksum_is_rejected() -> None:
    content = bytearray(png(SIDE, SIDE, 8, 0, [bytes(SIDE + 1)] * SIDE))
    content[content.index(b"IHDR") + 4 + 13] ^= 1
    assert reason(bytes(content)) == "Corrupt"


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([b"", *(content[:64] for content in make_files().values())]), rest=st.binary(max_size=300))
def test_any_bytes_decode_or_fail_with_a_reason(start: bytes, rest: bytes) -> None:
    try:
        outcome: object = decode(start + rest).shape
    except DecodeError as error:
        outcome = error.reason
    assert outcome in {(SIDE, SIDE, 3), "Empty", "NotAnImage", "UnsupportedFormat", "Truncated", "Corrupt"}


@pytest.mark.parametrize(
    ("sizes", "interpolation", "message"),
    [((0, 1), "bilinear", "resize_size"), ((1, 0), "bilinear", "crop_size"), ((1, 1), "cubic", "expected one of")],
)
def test_invalid_preprocessing_is_rejected(sizes: tuple[int, int], interpolation: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocessing(*sizes, interpolation, (0.0,), (1.0,))


def test_decoder_process_imports_no_heavy_modules() -> None:
    script = (
        "import sys, captionlib.data.images.decoder_process; "
        "print({'torch', 'pyarrow', 'pydantic', 'fsspec', 'aiohttp'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
