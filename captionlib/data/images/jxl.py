"""Reads the size of a JPEG XL image from its header, because the decoder reports it only after decoding all pixels."""

from fractions import Fraction

__all__ = ["read_jxl_size"]

_CODESTREAM_SIGNATURE = b"\xff\x0a"
_HEADER_BYTES = 16  # more than enough for the width and height, which take up to 9 bytes

# ISO/IEC 18181-1, section "SizeHeader". Two bits select the number of bits of a width or height, unless the image is
# small. Three bits select the width divided by the height; if they are 0, the header contains the width.
_DIMENSION_BITS = (9, 13, 18, 30)
_RATIOS = (None, *(Fraction(*ratio) for ratio in ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))))


def read_jxl_size(content: bytes) -> tuple[int, int] | None:
    """Returns the width and height of the image in a JPEG XL file, before rotation; None if the header is damaged."""
    header = content if content.startswith(_CODESTREAM_SIGNATURE) else _read_codestream(content)
    if len(header) < _HEADER_BYTES or not header.startswith(_CODESTREAM_SIGNATURE):
        return None
    bits = int.from_bytes(header[len(_CODESTREAM_SIGNATURE) : _HEADER_BYTES], "little")

    def read(count: int) -> int:  # least significant bit first
        nonlocal bits
        bits, value = divmod(bits, 1 << count)
        return value

    is_small = read(1)  # if so, a width or height is a multiple of 8, up to 256

    def read_dimension() -> int:
        return 8 * (1 + read(5)) if is_small else 1 + read(_DIMENSION_BITS[read(2)])

    height = read_dimension()
    ratio = _RATIOS[read(3)]
    return read_dimension() if ratio is None else int(height * ratio), height


def _read_codestream(content: bytes) -> bytes:
    """Returns the first bytes of the codestream (image data), which may be split across boxes of a container."""
    codestream, position = b"", 0
    while len(codestream) < _HEADER_BYTES and len(content) >= position + 8:
        size, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8]
        start = position + 8
        if size == 1:  # the size follows in 8 bytes
            size, start = int.from_bytes(content[start : start + 8], "big"), start + 8
        end = position + size if size else len(content)
        if end < start:
            break
        if kind in {b"jxlc", b"jxlp"}:
            first = start + 4 if kind == b"jxlp" else start  # a partial codestream begins with its number
            codestream += content[first : min(end, first + _HEADER_BYTES)]
        position = end
    return codestream
