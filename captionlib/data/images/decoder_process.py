"""The decoder process: takes images from its input and answers with pixels, until its input ends.

Started by `captionlib.data.images.decoder_pool`, which holds the other end of both pipes. A message is its length and
its bytes;
an answer has a kind before them. Its input also ends when the process that started it dies, however it dies.
"""

import json
import os
import pickle
import resource
import signal
import struct
import warnings
from typing import BinaryIO, NamedTuple

from PIL import Image

from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.errors import DecodeError

__all__ = ["ANSWER", "FAILURE", "IMAGE", "READY", "REQUEST", "DecoderSettings", "main"]

REQUEST = struct.Struct("<Q")
ANSWER = struct.Struct("<BQ")
READY, IMAGE, FAILURE = range(3)


class DecoderSettings(NamedTuple):
    """What a decoder process is told before its first image."""

    preprocessing: Preprocessing
    max_image_pixels: int
    max_memory_bytes: int
    max_seconds: float


def main() -> None:
    """Serves until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; what it means, the parent says
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not get among the answers
    settings: DecoderSettings = pickle.loads(_receive(requests))
    _limit(settings)
    _answer(answers, READY, b"")
    _silence()
    while request := requests.read(REQUEST.size):
        (size,) = REQUEST.unpack(request)
        _serve(requests.read(size), settings, answers)


def _serve(content: bytes, settings: DecoderSettings, answers: BinaryIO) -> None:
    signal.setitimer(signal.ITIMER_REAL, settings.max_seconds)
    try:
        pixels = decode_image(content, settings.preprocessing, settings.max_image_pixels)
    except DecodeError as error:
        _answer(answers, FAILURE, json.dumps([error.reason, str(error)]).encode())
    else:
        _answer(answers, IMAGE, pixels.data.cast("B"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit(settings: DecoderSettings) -> None:
    """Bounds the memory and ends the process by SIGALRM if one image takes too long and nobody is left to kill it."""
    Image.MAX_IMAGE_PIXELS = None  # decode_image has a limit of its own
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = settings.max_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _silence() -> None:
    """Drops what codecs print about damaged images: the answers say it."""
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _receive(requests: BinaryIO) -> bytes:
    (size,) = REQUEST.unpack(requests.read(REQUEST.size))
    return requests.read(size)


def _answer(answers: BinaryIO, kind: int, payload: bytes | memoryview) -> None:
    answers.write(ANSWER.pack(kind, len(payload)))
    answers.write(payload)
    answers.flush()
