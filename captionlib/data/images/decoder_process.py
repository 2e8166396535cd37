"""The program of a decoder process: reads image files from standard input and writes pixels to standard output.

`captionlib.data.images.decoder_pool` starts the process. A request consists of a header with the length of the payload,
and the payload. The header of a response also contains the kind of the response (READY, IMAGE or FAILURE) and, for an
image, its width and height. The process exits when its input ends, which also happens when its parent dies.
"""

import ctypes
import errno
import json
import os
import pickle
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from PIL import AvifImagePlugin, Image

from captionlib.data.images.decoding import DecodedImage, Preprocessing, SizeLimit, decode_image, out_of_memory
from captionlib.data.images.shrinking import shrink_image
from captionlib.errors import DecodeError

__all__ = ["FAILURE", "IMAGE", "READY", "REQUEST_HEADER", "RESPONSE_HEADER", "DecoderSettings", "main"]

REQUEST_HEADER = struct.Struct("<Q")
RESPONSE_HEADER = struct.Struct("<BQII")
READY, IMAGE, FAILURE = range(3)

_MIN_TIME_FRACTION = 0.1  # of the time limit, for the smallest image
_KEPT_BLOCKS = 4  # blocks of 16 MB that Pillow reuses; allocating new memory takes as long as decoding


class DecoderSettings(NamedTuple):
    """The payload of the first request, pickled. The payloads of the following requests are image files."""

    preprocessing: Preprocessing | SizeLimit
    max_image_pixels: int
    max_jpeg_scans: int
    max_memory_bytes: int
    timeout_seconds: float


def main() -> None:
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # redirects prints to standard error, so they do not corrupt responses
    payloads = _receive(requests)
    try:
        settings: DecoderSettings = pickle.loads(next(payloads))
        _limit_resources(settings)
        _respond(responses, READY, b"")
        _silence_codecs()
        for content in payloads:
            _handle(content, settings, responses)
    except (BrokenPipeError, StopIteration):  # the parent has died
        os._exit(1)  # an ordinary exit would try to write to the pipe again


def _handle(content: bytes, settings: DecoderSettings, responses: BinaryIO) -> None:
    # The parent kills a slow process earlier, unless the parent has died.
    signal.setitimer(signal.ITIMER_REAL, 2 * settings.timeout_seconds)
    try:
        image = _decode(content, settings)
    except DecodeError as error:
        _respond(responses, FAILURE, json.dumps([error.reason, str(error)]).encode())
    else:
        _respond(responses, IMAGE, image.pixels.data.cast("B"), image.width, image.height)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _decode(content: bytes, settings: DecoderSettings, is_retry: bool = False) -> DecodedImage:
    """Decodes an image. Distinguishes between damage and lack of memory, which some codecs report alike."""

    def limit_cpu_time(pixels: int) -> None:
        # SIGPROF ends the process if decoding takes too long for the size of the image.
        fraction = _MIN_TIME_FRACTION + (1 - _MIN_TIME_FRACTION) * pixels / settings.max_image_pixels
        signal.setitimer(signal.ITIMER_PROF, fraction * settings.timeout_seconds)

    limit_cpu_time(0)
    try:
        return decode_image(
            content, settings.preprocessing, settings.max_image_pixels, settings.max_jpeg_scans, limit_cpu_time
        )
    except DecodeError as error:
        c_errno = _c_errno()
        if error.reason != "Corrupt" or c_errno.value != errno.ENOMEM:
            raise
        if is_retry:
            raise out_of_memory() from None
    c_errno.value = 0  # an earlier image may have set it
    return _decode(content, settings, is_retry=True)


def _c_errno() -> ctypes.c_int:
    """Returns the variable `errno` of the C library. It is ENOMEM after an allocation of memory has failed."""
    library = ctypes.CDLL(None)
    locate = library["__errno_location" if sys.platform == "linux" else "__error"]
    locate.restype = ctypes.POINTER(ctypes.c_int)
    return cast(ctypes.c_int, locate().contents)


def _limit_resources(settings: DecoderSettings) -> None:
    Image.MAX_IMAGE_PIXELS = None  # decode_image checks its own limit
    Image.core.set_blocks_max(_KEPT_BLOCKS)  # type: ignore[attr-defined]
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the pool runs one process per CPU
    # OpenBLAS allocates its buffer in the first multiplication. If that fails, it ends the process.
    shrink_image(np.zeros((64, 1024, 3), np.uint8), (8, 8), (0, 0, 1024, 64))
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    is_unlimited = hard_limit == resource.RLIM_INFINITY
    limit = settings.max_memory_bytes if is_unlimited else min(settings.max_memory_bytes, hard_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _silence_codecs() -> None:
    """Discards messages that codecs print about damaged images, because the responses contain the errors."""
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)


def _receive(requests: BinaryIO) -> Iterator[bytes]:
    while header := requests.read(REQUEST_HEADER.size):
        yield requests.read(*REQUEST_HEADER.unpack(header))


def _respond(responses: BinaryIO, kind: int, payload: bytes | memoryview, width: int = 0, height: int = 0) -> None:
    responses.write(RESPONSE_HEADER.pack(kind, len(payload), width, height))
    responses.write(payload)
    responses.flush()
