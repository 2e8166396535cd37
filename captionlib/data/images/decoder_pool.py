"""Decodes images in separate processes, because damaged or malicious images can hang or crash a decoder.

Each process decodes one image at a time, with a timeout and a memory limit. A process that does not respond is killed
and replaced. Each process is a new interpreter, not a fork, so it inherits no threads or locks.
"""

import fcntl
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from captionlib.config import configclass
from captionlib.data.images.decoder_process import FAILURE, REQUEST_HEADER, RESPONSE_HEADER, DecoderSettings
from captionlib.data.images.decoding import (
    MAX_IMAGE_PIXELS,
    MAX_JPEG_SCANS,
    DecodedImage,
    Preprocessing,
    SizeLimit,
)
from captionlib.errors import DecodeError, SubprocessError

__all__ = ["DecoderConfig", "DecoderPool", "available_cpus"]

_WORKER = "captionlib.data.images.decoder_process"

_BYTES_PER_PIXEL = 28  # upper bound; the measured maximum is 26, for a JPEG 2000 file with transparency
_BASE_MEMORY_BYTES = 2**30  # for libraries and the image file

# glibc keeps up to 32 MB of freed memory for the next image. Getting it from the system again takes longer.
# Blocks of 8 MB or more are returned nevertheless, because gaps between them would use up the address space.
_MALLOC_DEFAULTS = {"MALLOC_MMAP_THRESHOLD_": str(2**23), "MALLOC_TRIM_THRESHOLD_": str(2**25)}

_START_TIMEOUT_SECONDS = 120.0
_PIPE_BYTES = 2**18  # large enough for a preprocessed image, so that neither end waits


@configclass
class DecoderConfig:
    """Limits on decoding an image.

    Attributes:
        processes: maximum number of decoder processes, which start on demand. If None, it is the number of CPUs.
        timeout_seconds: limit on the time to decode an image; a process that takes longer is killed. The limit on CPU
            time grows with the number of pixels: from a tenth of `timeout_seconds` for the smallest image to
            `timeout_seconds` for `max_image_pixels`.
        max_image_pixels: limit on width x height. Larger images are rejected before they are decoded.
        max_jpeg_scans: limit on the scans of a JPEG file. Files with more are rejected before they are decoded.
        max_memory_bytes: limit on the address space of a process. If None, the limit is large enough to decode an image
            of `max_image_pixels`.
    """

    processes: PositiveInt | None = None
    timeout_seconds: PositiveFloat = 60.0
    max_image_pixels: PositiveInt = MAX_IMAGE_PIXELS
    max_jpeg_scans: PositiveInt = MAX_JPEG_SCANS
    max_memory_bytes: Annotated[int, Field(ge=2**28)] | None = None


class DecoderPool:
    """A pool of decoder processes. Thread-safe. As a context manager, it kills the processes on exit."""

    def __init__(self, preprocessing: Preprocessing | SizeLimit, config: DecoderConfig | None = None) -> None:
        self.config = config or DecoderConfig()
        self.size = self.config.processes or available_cpus()
        self._preprocessing = preprocessing
        self._settings = pickle.dumps(
            DecoderSettings(
                preprocessing=preprocessing,
                max_image_pixels=self.config.max_image_pixels,
                max_jpeg_scans=self.config.max_jpeg_scans,
                max_memory_bytes=self.config.max_memory_bytes
                or _BASE_MEMORY_BYTES + _BYTES_PER_PIXEL * self.config.max_image_pixels,
                timeout_seconds=self.config.timeout_seconds,
            )
        )
        self._slots = threading.Semaphore(self.size)
        self._lock = threading.Lock()
        self._idle: list[_Decoder] = []
        self._running: set[_Decoder] = set()
        self._closed = False

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The ids of the running processes."""
        with self._lock:
            return [decoder.process.pid for decoder in self._running]

    def decode(self, content: bytes) -> DecodedImage:
        """Decodes and preprocesses an image like `decode_image`. Waits until a process is free.

        Raises:
            DecodeError: see `decode_image`. The reason may also be Timeout or DecoderDied.
            SubprocessError: a process cannot be started, or the pool is closed.
        """
        with self._slots:
            # If the process dies, perhaps not because of this image, the image is retried in a new process.
            image = self._try_decode(content, self._acquire) or self._try_decode(content, self._start)
        if image is None:
            raise DecodeError("DecoderDied", "two decoder processes died while decoding the image")
        return image

    def close(self) -> None:
        """Kills the processes. Calls of `decode` that are in progress raise SubprocessError."""
        with self._lock:
            self._closed = True
            running, idle = list(self._running), self._idle
            self._idle = []
        for decoder in running:
            decoder.process.kill()
        for decoder in running:
            decoder.process.wait()
        for decoder in idle:
            self._discard(decoder)

    def _try_decode(self, content: bytes, acquire: Callable[[], "_Decoder"]) -> DecodedImage | None:
        """Decodes an image. Returns None if the process died."""
        try:
            decoder = acquire()
            try:
                result = decoder.decode(content, self._preprocessing, self.config.timeout_seconds)
            except BaseException as error:  # a late response must not be taken for the response to the next request
                self._discard(decoder)
                exceeded_cpu_time = decoder.process.returncode == -signal.SIGPROF
                if exceeded_cpu_time and isinstance(error, EOFError | ConnectionError):
                    raise TimeoutError from error
                raise
        except TimeoutError:
            limit = f"{self.config.timeout_seconds:g} seconds for {self.config.max_image_pixels} pixels"
            message = f"decoding took too long for the size of the image; the limit is {limit}"
            raise DecodeError("Timeout", message) from None
        except (EOFError, ConnectionError):
            self._check_open()
            return None
        with self._lock:
            self._idle.append(decoder)
        if isinstance(result, DecodeError):
            raise result
        return result

    def _acquire(self) -> "_Decoder":
        """Returns an idle decoder or starts a new one. The caller must hold one of the slots."""
        while True:
            with self._lock:
                decoder = self._idle.pop() if self._idle else None
            if decoder is None:
                return self._start()
            if decoder.process.poll() is None:
                return decoder
            self._discard(decoder)

    def _start(self) -> "_Decoder":
        with self._lock:
            self._check_open()
            decoder = _Decoder()
            self._running.add(decoder)
        try:
            decoder.initialize(self._settings)
        except (EOFError, ConnectionError, TimeoutError) as error:
            self._discard(decoder)
            status = decoder.process.returncode
            if status < 0 and not isinstance(error, TimeoutError):  # killed by a signal, so another attempt may succeed
                raise
            raise SubprocessError(
                f"a decoder process did not start: {type(error).__name__}, exit status {status}; expected "
                f"{sys.executable} to run {_WORKER}; see what the process printed above"
            ) from None
        return decoder

    def _discard(self, decoder: "_Decoder") -> None:
        with self._lock:
            self._running.discard(decoder)
        decoder.kill()

    def _check_open(self) -> None:
        if self._closed:
            raise SubprocessError("the decoder pool is closed; decode images before closing it")


class _Decoder:
    """A decoder process, and pipes to and from it."""

    def __init__(self) -> None:
        paths = [path for path in sys.path if isinstance(path, str)]
        # Ctrl-C reaches all processes of the terminal, even while they start. The parent handles it.
        ignore_ctrl_c = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{ignore_ctrl_c}; sys.path[:] = {paths!r}; from {_WORKER} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # more threads of OpenBLAS would use up the address space
            env={**_MALLOC_DEFAULTS, **os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._responses = self.process.stdin, self.process.stdout
        os.set_blocking(self._requests.fileno(), False)
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._requests, select.POLLOUT)
        self._readable.register(self._responses, select.POLLIN)
        self._start_timeout(_START_TIMEOUT_SECONDS)

    def initialize(self, settings: bytes) -> None:
        """Sends the settings and waits until the process is ready. Raises the same exceptions as `decode`."""
        for pipe in (self._requests, self._responses):
            if hasattr(fcntl, "F_SETPIPE_SZ"):
                with suppress(OSError):  # the system limits the total size of pipes
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._send(settings)
        self._receive(RESPONSE_HEADER.size)

    def decode(
        self, content: bytes, preprocessing: Preprocessing | SizeLimit, timeout_seconds: float
    ) -> DecodedImage | DecodeError:
        """Decodes an image. Raises EOFError or ConnectionError if the process ends, TimeoutError if it is too slow."""
        self._start_timeout(timeout_seconds)
        self._send(content)
        kind, size, width, height = RESPONSE_HEADER.unpack(self._receive(RESPONSE_HEADER.size))
        payload = self._receive(size)
        if kind == FAILURE:
            return DecodeError(*json.loads(payload))
        columns, rows = preprocessing.output_size(width, height)
        return DecodedImage(np.frombuffer(payload, np.uint8).reshape(rows, columns, 3), width, height)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._requests.close()
        self._responses.close()

    def _start_timeout(self, seconds: float) -> None:
        """Starts a timeout of ten equal intervals. A suspension of this process uses up only one of them."""
        self._interval_milliseconds, self._intervals = 100 * seconds, 10

    def _wait_for(self, pipe: select.poll) -> None:
        while not pipe.poll(self._interval_milliseconds):
            self._intervals -= 1
            if not self._intervals:
                raise TimeoutError

    def _send(self, content: bytes) -> None:
        for part in (REQUEST_HEADER.pack(len(content)), content):
            remaining = memoryview(part)
            while remaining:
                self._wait_for(self._writable)
                remaining = remaining[os.write(self._requests.fileno(), remaining) :]

    def _receive(self, size: int) -> bytearray:
        content = bytearray(size)
        remaining = memoryview(content)
        while remaining:
            self._wait_for(self._readable)
            count = os.readv(self._responses.fileno(), [remaining])
            if not count:
                raise EOFError
            remaining = remaining[count:]
        return content


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
