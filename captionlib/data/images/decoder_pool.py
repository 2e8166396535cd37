"""Decoder processes: damaged or hostile images hang, crash or blow up a process that can be spared.

Each decodes one image at a time within a time-out and a memory limit; one that does not answer is killed, and another
takes its place. They are programs of their own, not forks: nothing is inherited, however and wherever a pool is made.
"""

import fcntl
import json
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from captionlib.cpus import available_cpus
from captionlib.data.images.decoder_process import ANSWER, FAILURE, REQUEST, DecoderSettings
from captionlib.data.images.decoding import MAX_IMAGE_PIXELS, Preprocessing
from captionlib.errors import ConfigError, DecodeError, SubprocessError

__all__ = ["DecoderConfig", "DecoderPool"]

Pixels = npt.NDArray[np.uint8]

_WORKER = "captionlib.data.images.decoder_process"

# Decoding takes at most 21 bytes a pixel (measured; a 32-bit TIFF), beside the libraries and the file.
_BYTES_PER_PIXEL, _BYTES_BESIDES = 24, 2**30

_START_SECONDS = 120.0
_PIPE_BYTES = 2**18  # a preprocessed image in one piece


@dataclass(frozen=True)
class DecoderConfig:
    """What decoding may take.

    Attributes:
        processes: decoders at most, started as they are needed; None: one for each CPU that this process may use.
        timeout_seconds: for one image; a decoder that takes longer is killed.
        max_image_pixels: width x height; larger images are refused before they are decoded.
        max_memory_bytes: address space of a decoder; None: what an image of `max_image_pixels` may need.
    """

    processes: int | None = None
    timeout_seconds: float = 60.0
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("max_image_pixels", 1), ("max_memory_bytes", 2**28)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}")
        if self.timeout_seconds <= 0:
            raise ConfigError(f"timeout_seconds: expected more than 0, got {self.timeout_seconds}")


class DecoderPool:
    """Decoder processes that threads borrow, an image at a time. A context manager; none is left after it.

    Args:
        preprocessing: what the encoder expects of an image.
        config: how many decoders, and their limits.
    """

    def __init__(self, preprocessing: Preprocessing, config: DecoderConfig | None = None) -> None:
        self.config = config or DecoderConfig()
        self.size = self.config.processes or available_cpus()
        crop = preprocessing.crop_size
        self._shape = (crop, crop, 3)
        self._settings = pickle.dumps(
            DecoderSettings(
                preprocessing=preprocessing,
                max_image_pixels=self.config.max_image_pixels,
                max_memory_bytes=self.config.max_memory_bytes
                or _BYTES_BESIDES + _BYTES_PER_PIXEL * self.config.max_image_pixels,
                max_seconds=2 * self.config.timeout_seconds,  # the pool comes first, as long as there is one
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
        """The processes that run now."""
        with self._lock:
            return [decoder.process.pid for decoder in self._running]

    def decode(self, content: bytes) -> Pixels:
        """Decodes and preprocesses an image in a process of the pool; waits until one is free.

        Args:
            content: of a file; see `captionlib.data.images.decoding.decode_image`.

        Returns:
            `[crop_size, crop_size, 3] uint8`, RGB.

        Raises:
            DecodeError: as `decode_image` does; its reason may also be Timeout or DecoderDied.
            SubprocessError: decoders cannot be started, or the pool is closed.
        """
        with self._slots:
            answer = self._ask(content, self._take)
            if (
                answer is None
            ):  # its decoder died, of it or of something else: a new one, not one that died too, will tell
                answer = self._ask(content, self._start)
        if answer is None:
            raise DecodeError("DecoderDied", "two decoder processes died while they decoded it")
        if isinstance(answer, DecodeError):
            raise answer
        return answer

    def close(self) -> None:
        """Kills the processes; threads that wait for one get an error."""
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

    def _ask(self, content: bytes, borrow: Callable[[], "_Decoder"]) -> Pixels | DecodeError | None:
        try:
            decoder = borrow()
        except (EOFError, ConnectionError):
            self._check_open()
            return None
        try:
            answer = decoder.ask(content, self._shape, self.config.timeout_seconds)
        except TimeoutError:
            self._discard(decoder)
            return DecodeError("Timeout", f"decoding took longer than {self.config.timeout_seconds:g} seconds")
        except (EOFError, ConnectionError):
            self._discard(decoder)
            self._check_open()
            return None
        except BaseException:  # in the middle of an exchange: what it says next is an answer to this image
            self._discard(decoder)
            raise
        with self._lock:
            self._idle.append(decoder)
        return answer

    def _take(self) -> "_Decoder":
        """An idle decoder, or a new one: there is room for it, as this thread has a slot."""
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
            decoder.prepare(self._settings)
        except (EOFError, ConnectionError, TimeoutError) as error:
            self._discard(decoder)
            status = decoder.process.returncode
            if status < 0 and not isinstance(error, TimeoutError):  # killed: that may happen to anything
                raise
            raise SubprocessError(
                f"a decoder process did not start: {type(error).__name__}, exit status {status}; expected "
                f"{sys.executable} to run {_WORKER}; what it printed says why"
            ) from None
        return decoder

    def _discard(self, decoder: "_Decoder") -> None:
        with self._lock:
            self._running.discard(decoder)
        decoder.end()

    def _check_open(self) -> None:
        if self._closed:
            raise SubprocessError("the decoder pool is closed: images are decoded only while it is open")


class _Decoder:
    """A decoder process and the pipes to and from it."""

    def __init__(self) -> None:
        paths = [path for path in sys.path if isinstance(path, str)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}; from {_WORKER} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # its threads would reserve memory that is limited
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        os.set_blocking(self._requests.fileno(), False)
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(self._requests, select.POLLOUT)
        self._readable.register(self._answers, select.POLLIN)
        self._patience = _Patience(0.0)

    def prepare(self, settings: bytes) -> None:
        """Sends the settings and waits until the process has started.

        Raises:
            EOFError, ConnectionError: it ended.
            TimeoutError: it does not answer.
        """
        self._patience = _Patience(_START_SECONDS)
        _widen(self._requests.fileno())
        _widen(self._answers.fileno())
        self._send(settings)
        self._receive(ANSWER.size)

    def ask(self, content: bytes, shape: tuple[int, ...], seconds: float) -> Pixels | DecodeError:
        """Has an image decoded.

        Raises:
            EOFError, ConnectionError: the process ended.
            TimeoutError: it takes longer than `seconds`.
        """
        self._patience = _Patience(seconds)
        self._send(content)
        kind, size = ANSWER.unpack(self._receive(ANSWER.size))
        answer = self._receive(size)
        if kind == FAILURE:
            return DecodeError(*json.loads(answer))
        return np.frombuffer(answer, np.uint8).reshape(shape)

    def end(self) -> None:
        """Kills the process, if it still runs, and collects it."""
        self.process.kill()
        self.process.wait()
        self._requests.close()
        self._answers.close()

    def _send(self, content: bytes) -> None:
        for part in (REQUEST.pack(len(content)), content):
            left = memoryview(part)
            while left:
                self._patience.wait(self._writable)
                left = left[os.write(self._requests.fileno(), left) :]

    def _receive(self, size: int) -> bytearray:
        content = bytearray(size)
        left = memoryview(content)
        while left:
            self._patience.wait(self._readable)
            count = os.readv(self._answers.fileno(), [left])
            if not count:
                raise EOFError
            left = left[count:]
        return content


class _Patience:
    """Waits, in all, as long as it was given: counted in waits, so a process that is suspended meanwhile loses none."""

    def __init__(self, seconds: float) -> None:
        self._turn_milliseconds, self._turns = 100 * seconds, 10

    def wait(self, pipe: select.poll) -> None:
        while not pipe.poll(self._turn_milliseconds):
            self._turns -= 1
            if not self._turns:
                raise TimeoutError


def _widen(descriptor: int) -> None:
    """Makes a pipe hold a whole image where that is possible, so that neither end waits in the middle of it."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
