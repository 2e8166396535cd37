import contextlib
import fcntl
import os
import pickle
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoder_process import REQUEST_HEADER, DecoderSettings
from captionlib.data.images.decoding import decode_image
from captionlib.errors import CaptionlibError, ConfigError, DecodeError
from tests.data.images.sample_images import (
    PREPROCESSING,
    encode_image,
    encode_png,
    huge_png,
    make_files,
    make_image,
    slow_jpeg,
)

GOOD = encode_image(make_image(), "JPEG")


@pytest.fixture(scope="module")
def shared() -> Iterator[DecoderPool]:
    with DecoderPool(PREPROCESSING, DecoderConfig(processes=2)) as pool:
        yield pool


def open_pool(processes: int = 1, timeout_seconds: float = 60.0, max_memory_bytes: int | None = None) -> DecoderPool:
    return DecoderPool(
        PREPROCESSING,
        DecoderConfig(processes, timeout_seconds, max_jpeg_scans=10**6, max_memory_bytes=max_memory_bytes),
    )


def is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def wait_until_ended(pid: int) -> bool:
    """Waits until a process that is not a child ends; returns whether it does."""
    for _ in range(1000):
        if not is_running(pid):
            return True
        time.sleep(0.02)
    return False


def reason(pool: DecoderPool, content: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        pool.decode(content)
    assert str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("name", make_files())
def test_pool_decodes_like_decode_image(shared: DecoderPool, name: str) -> None:
    decoded = shared.decode(make_files()[name])
    np.testing.assert_array_equal(decoded.pixels, decode_image(make_files()[name], PREPROCESSING).pixels)
    assert decoded.pixels.dtype == np.uint8
    assert (decoded.width, decoded.height) == (90, 60)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "Empty"), (b"text", "NotAnImage"), (GOOD[:-300], "Truncated"), (huge_png(), "TooManyPixels")],
)
def test_pool_reports_decode_errors(shared: DecoderPool, content: bytes, expected: str) -> None:
    assert reason(shared, content) == expected
    assert shared.decode(GOOD).pixels.shape == (40, 40, 3)


def test_large_files_are_decoded(shared: DecoderPool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    content = encode_png(noise, 2)
    assert len(content) > 2_900_000
    np.testing.assert_array_equal(shared.decode(content).pixels, decode_image(content, PREPROCESSING).pixels)


@pytest.mark.parametrize("name", make_files())
def test_flipped_bits_decode_or_fail_with_a_reason(shared: DecoderPool, name: str) -> None:
    content = make_files()[name]
    random = np.random.default_rng(0)
    shapes, reasons = set(), set()
    for _ in range(60):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), random.integers(1, 9)):
            damaged[position] ^= 1 << int(random.integers(8))
        try:
            shapes.add(shared.decode(bytes(damaged)).pixels.shape)
        except DecodeError as error:
            reasons.add(error.reason)
    assert shapes <= {(40, 40, 3)}
    known = {"Truncated", "Corrupt", "NotAnImage", "UnsupportedFormat", "TooManyPixels", "OutOfMemory"}
    assert reasons <= known
    assert shapes or reasons


def test_threads_share_the_processes(shared: DecoderPool) -> None:
    contents = [encode_image(make_image(seed=seed), "PNG") for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        decoded = list(threads.map(shared.decode, contents))
    for content, image in zip(contents, decoded, strict=True):
        np.testing.assert_array_equal(image.pixels, decode_image(content, PREPROCESSING).pixels)
    assert len(shared.pids) == 2


def test_processes_start_on_demand_and_end_with_the_pool() -> None:
    with open_pool(processes=2) as pool:
        assert pool.pids == []
        pool.decode(GOOD)
        (pid,) = pool.pids
        pool.decode(GOOD)
        assert pool.pids == [pid]
    assert not is_running(pid)
    with pytest.raises(CaptionlibError, match="closed"):
        pool.decode(GOOD)


def test_slow_image_times_out() -> None:
    with open_pool(timeout_seconds=1.0) as pool:
        assert reason(pool, slow_jpeg(50_000)) == "Timeout"
        assert pool.decode(GOOD).pixels.shape == (40, 40, 3)


def test_small_image_gets_less_time_than_a_large_one() -> None:
    """The limit is 10 seconds for the largest image, so the file may take 1 second of CPU time."""
    with open_pool(timeout_seconds=10.0) as pool:
        pool.decode(GOOD)
        (pid,) = pool.pids
        assert reason(pool, slow_jpeg(8_000)) == "Timeout"
        assert not is_running(pid)
        assert pool.decode(GOOD).pixels.shape == (40, 40, 3)


def test_hanging_decoder_is_replaced() -> None:
    with open_pool(timeout_seconds=1.0) as pool:
        pool.decode(GOOD)
        (stopped,) = pool.pids
        os.kill(stopped, signal.SIGSTOP)
        assert reason(pool, GOOD) == "Timeout"
        assert not is_running(stopped)
        pool.decode(GOOD)
        assert stopped not in pool.pids


def test_hanging_decoder_with_full_pipe_is_replaced() -> None:
    with open_pool(timeout_seconds=1.0) as pool:
        pool.decode(GOOD)
        os.kill(pool.pids[0], signal.SIGSTOP)
        assert reason(pool, GOOD + bytes(2_000_000)) == "Timeout"
        assert pool.decode(GOOD).pixels.shape == (40, 40, 3)


def has_pending_request(pid: int) -> bool:
    """Returns whether the pipe to a decoder has unread data."""
    with Path(f"/proc/{pid}/fd/0").open("rb", buffering=0) as pipe:
        (size,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))
    return bool(size)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_image_is_retried_when_its_decoder_is_killed() -> None:
    with open_pool() as pool, ThreadPoolExecutor(1) as thread:
        pool.decode(GOOD)
        (killed,) = pool.pids
        os.kill(killed, signal.SIGSTOP)  # so that it cannot finish before it is killed
        os.waitpid(killed, os.WUNTRACED)  # until it has stopped, it may still read a request
        decoded = thread.submit(pool.decode, GOOD)
        while not has_pending_request(killed):
            time.sleep(0.001)
        os.kill(killed, signal.SIGKILL)
        np.testing.assert_array_equal(decoded.result().pixels, decode_image(GOOD, PREPROCESSING).pixels)
        assert killed not in pool.pids


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_image_fails_when_two_decoders_die() -> None:
    endless = slow_jpeg(50_000)
    with open_pool() as pool, ThreadPoolExecutor(1) as thread:
        pool.decode(GOOD)
        busy = 2 * processor_seconds(pool.pids[0])  # more than it took to start
        given_up = thread.submit(reason, pool, endless)
        killed: set[int] = set()
        while not given_up.done():
            for pid in set(pool.pids) - killed:
                if processor_seconds(pid) > busy:
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        assert given_up.result() == "DecoderDied"
        assert len(killed) == 2
        assert pool.decode(GOOD).pixels.shape == (40, 40, 3)


def test_killed_idle_decoders_are_replaced() -> None:
    with open_pool(processes=2) as pool:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(pool.decode, [encode_image(make_image(900, 900), "PNG")] * 10))
        killed = pool.pids
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        for _ in killed:
            np.testing.assert_array_equal(pool.decode(GOOD).pixels, decode_image(GOOD, PREPROCESSING).pixels)
        assert set(pool.pids) - set(killed)


def test_memory_is_limited() -> None:
    content = encode_png(np.zeros((9000, 9000, 2), np.uint8), 4)
    with open_pool(max_memory_bytes=2**28) as pool:
        assert reason(pool, content) == "OutOfMemory"
        pid = pool.pids
        assert pool.decode(GOOD).pixels.shape == (40, 40, 3)
        assert pool.pids == pid


@pytest.mark.parametrize(
    ("mode", "side", "kind", "options"),
    [
        ("RGB", 3000, "JPEG", {}),
        ("L", 6400, "JPEG", {"progressive": True}),
        ("RGB", 4000, "WEBP", {"lossless": True, "quality": 0, "method": 0}),
        ("RGB", 2600, "JPEG2000", {}),
    ],
)
def test_lack_of_memory_is_distinguished_from_damage(mode: str, side: int, kind: str, options: dict[str, Any]) -> None:
    damaged = bytearray(encode_image(make_image(300, 300), "WEBP", lossless=True))
    damaged[200:240] = bytes(40)
    with open_pool(max_memory_bytes=2**28) as pool:
        assert reason(pool, encode_image(make_image(side, side).convert(mode), kind, **options)) == "OutOfMemory"
        assert reason(pool, bytes(damaged)) == "Corrupt"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_settings_of_the_memory_allocator_in_the_environment_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    with open_pool() as pool:
        pool.decode(GOOD)
        environment = Path(f"/proc/{pool.pids[0]}/environ").read_bytes().split(b"\0")
    assert {b"MALLOC_TRIM_THRESHOLD_=1000000", b"MALLOC_MMAP_THRESHOLD_=8388608", b"OPENBLAS_NUM_THREADS=1"} <= {
        *environment
    }


def test_default_memory_fits_the_largest_image() -> None:
    limits = DecoderConfig(processes=1, max_image_pixels=3_000_000)
    with DecoderPool(PREPROCESSING, limits) as pool:
        content = encode_image(make_image(1500, 2000).convert("RGBA"), "TIFF", compression="tiff_lzw")
        assert pool.decode(content).pixels.shape == (40, 40, 3)
        assert reason(pool, encode_image(make_image(1500, 2001), "PNG")) == "TooManyPixels"


def test_decoders_ignore_ctrl_c() -> None:
    with open_pool() as pool:
        pool.decode(GOOD)
        (pid,) = pool.pids
        os.kill(pid, signal.SIGINT)
        assert pool.decode(GOOD).pixels.shape == (40, 40, 3)
        assert pool.pids == [pid]


@pytest.mark.parametrize("sends_settings", [False, True])
def test_process_whose_parent_dies_while_it_starts_prints_nothing(sends_settings: bool) -> None:
    settings = pickle.dumps(DecoderSettings(PREPROCESSING, 10**6, 10, 2**40, 60.0))
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", "from captionlib.data.images.decoder_process import main; main()"],
        input=REQUEST_HEADER.pack(len(settings)) + settings if sends_settings else b"",
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, b"")


def test_close_cancels_decoding() -> None:
    pool = open_pool()
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(pool.decode, slow_jpeg(50_000)) for _ in range(3)]
        while not pool.pids:
            time.sleep(0.01)
        pids = pool.pids
        pool.close()
        for future in waiting:
            with pytest.raises(CaptionlibError, match="closed"):
                future.result()
    assert not any(map(is_running, pids))
    assert pool.pids == []


def test_decoder_that_cannot_start_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with open_pool() as pool, pytest.raises(CaptionlibError, match="did not start"):
        pool.decode(GOOD)


SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import Preprocessing

good, slow, death = sys.argv[1:]
pool = DecoderPool(Preprocessing(48, 40, "bilinear", (0,), (1,)), DecoderConfig(1, 1.0, max_jpeg_scans=10**6))
print(pool.decode(Path(good).read_bytes()).pixels.shape, pool.pids[0], flush=True)
if death == "killed in the middle":
    threading.Thread(target=pool.decode, args=[Path(slow).read_bytes()], daemon=True).start()
    time.sleep(0.2)
if death != "end":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("how", "death"),
    [("file", "end"), ("argument", "end"), ("input", "end"), ("file", "killed"), ("file", "killed in the middle")],
)
def test_pool_works_in_any_program_and_ends_with_it(how: str, death: str, tmp_path: Path) -> None:
    """Runs scripts without a main guard, `python -c` and standard input; all leave the pool open."""
    script, good, slow = (tmp_path / name for name in ("script.py", "good", "slow"))
    script.write_text(SCRIPT)
    good.write_bytes(GOOD)
    slow.write_bytes(slow_jpeg(50_000))
    start = {"file": [str(script)], "argument": ["-c", SCRIPT], "input": ["-"]}[how]
    ran = subprocess.run(
        [sys.executable, *start, str(good), str(slow), death],
        input=SCRIPT if how == "input" else "",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == (0 if death == "end" else -signal.SIGKILL), ran.stderr
    shape, pid = ran.stdout.rsplit(maxsplit=1)
    assert shape == "(40, 40, 3)"
    assert wait_until_ended(int(pid))


@pytest.mark.parametrize(
    "wrong",
    [
        {"processes": 0},
        {"timeout_seconds": 0},
        {"max_image_pixels": 0},
        {"max_jpeg_scans": 0},
        {"max_memory_bytes": 1000},
    ],
)
def test_invalid_limits_are_rejected(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DecoderConfig(**wrong)
