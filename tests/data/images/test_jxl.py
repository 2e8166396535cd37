import io

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.data.images.jxl import read_jxl_size
from captionlib.errors import DecodeError

pytest.importorskip("pillow_jxl")

PREPROCESSING = Preprocessing(48, 40, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BOX = b"\0\0\0\x0cJXL \r\n\x87\n"


def encode(size: tuple[int, int], container: bool = False) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "JXL", effort=1, use_container=container)
    return file.getvalue()


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (60, 90), (256, 256), (264, 8), (513, 2), (640, 480), (120, 100), (9000, 2)])
def test_size_is_read_from_the_header(size: tuple[int, int], container: bool) -> None:
    assert read_jxl_size(encode(size, container)) == size


def test_size_is_read_from_a_header_in_parts() -> None:
    codestream = encode((60, 90))
    parts = [codestream[:3], codestream[3:]]
    boxes = [
        (len(part) + 12).to_bytes(4, "big") + b"jxlp" + bytes([0, 0, 0, number]) + part
        for number, part in enumerate(parts)
    ]
    large = (1).to_bytes(4, "big") + b"free" + (20).to_bytes(8, "big") + bytes(4)
    assert read_jxl_size(BOX + large + b"".join(boxes)) == (60, 90)


@given(st.binary(max_size=64))
def test_damaged_headers_have_no_size_or_a_valid_size(rest: bytes) -> None:
    for start in (b"\xff\x0a", BOX, BOX + b"\0\0\0\0jxlc\xff\x0a"):
        size = read_jxl_size(start + rest)
        assert size is None or min(size) > 0


def test_pixels_are_limited_before_the_file_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode((60, 90))
    assert np.all(decode_image(content, PREPROCESSING, 5400).pixels[..., 0] > 250)
    monkeypatch.delitem(Image.OPEN, "JXL")
    with pytest.raises(DecodeError, match="60 x 90") as caught:
        decode_image(content, PREPROCESSING, 5399)
    assert caught.value.reason == "TooManyPixels"
