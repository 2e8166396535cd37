import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import decode_image
from captionlib.errors import CaptionlibError, ConfigError, DecodeError
from tests.data.images.sample_images import PREPROCESSING, files, huge_png, photo, png_of, saved, slow_jpeg

GOOD = saved(photo(), "JPEG")


@pytest.fixture(scope="module")
def shared() -> Iterator[DecoderPool]:
    with DecoderPool(PREPROCESSING, DecoderConfig(processes=2)) as pool:
        yield pool


def open_pool(processes: int = 1, timeout_seconds: float = 60.0, max_memory_bytes: int | None = None) -> DecoderPool:
    return DecoderPool(
        PREPROCESSING,
        DecoderConfig(processes=processes, timeout_seconds=timeout_seconds, max_memory_bytes=max_memory_bytes),
    )


def runs(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def ends(pid: int) -> bool:
    """Whether a process that is not ours to wait for ends; waits for that."""
    for _ in range(1000):
        if not runs(pid):
            return True
        time.sleep(0.02)
    return False


def reason(pool: DecoderPool, content: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        pool.decode(content)
    assert str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("name", files())
def test_answers_what_decoding_gives(shared: DecoderPool, name: str) -> None:
    decoded = shared.decode(files()[name])
    np.testing.assert_array_equal(decoded, decode_image(files()[name], PREPROCESSING))
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "Empty"), (b"text", "NotAnImage"), (GOOD[:-300], "Truncated"), (huge_png(), "TooManyPixels")],
)
def test_answers_why_an_image_cannot_be_decoded(shared: DecoderPool, content: bytes, expected: str) -> None:
    assert reason(shared, content) == expected
    assert shared.decode(GOOD).shape == (40, 40, 3)


def test_large_files_travel_whole(shared: DecoderPool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    content = png_of(noise, 2)
    assert len(content) > 2_900_000
    np.testing.assert_array_equal(shared.decode(content), decode_image(content, PREPROCESSING))


@pytest.mark.parametrize("name", files())
def test_flipped_bits_give_an_image_or_a_reason(shared: DecoderPool, name: str) -> None:
    content = files()[name]
    random = np.random.default_rng(0)
    shapes, reasons = set(), set()
    for _ in range(60):
        damaged = bytearray(content)
        for position in random.integers(0, len(content), random.integers(1, 9)):
            damaged[position] ^= 1 << int(random.integers(8))
        try:
            shapes.add(shared.decode(bytes(damaged)).shape)
        except DecodeError as error:
            reasons.add(error.reason)
    assert shapes <= {(40, 40, 3)}
    known = {"Truncated", "Corrupt", "NotAnImage", "UnsupportedFormat", "TooManyPixels", "OutOfMemory"}
    assert reasons <= known
    assert shapes or reasons


def test_threads_share_as_many_processes_as_were_asked_for(shared: DecoderPool) -> None:
    contents = [saved(photo(seed=seed), "PNG") for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        decoded = list(threads.map(shared.decode, contents))
    for content, pixels in zip(contents, decoded, strict=True):
        np.testing.assert_array_equal(pixels, decode_image(content, PREPROCESSING))
    assert len(shared.pids) == 2


def test_processes_start_when_they_are_needed_and_end_with_the_pool() -> None:
    with open_pool(processes=2) as pool:
        assert pool.pids == []
        pool.decode(GOOD)
        (pid,) = pool.pids
        pool.decode(GOOD)
        assert pool.pids == [pid]
    assert not runs(pid)
    with pytest.raises(CaptionlibError, match="closed"):
        pool.decode(GOOD)


def test_an_image_that_takes_too_long_is_given_up() -> None:
    with open_pool(timeout_seconds=1.0) as pool:
        assert reason(pool, slow_jpeg(50_000)) == "Timeout"
        assert pool.decode(GOOD).shape == (40, 40, 3)


def test_a_decoder_that_hangs_is_replaced() -> None:
    with open_pool(timeout_seconds=1.0) as pool:
        pool.decode(GOOD)
        (stopped,) = pool.pids
        os.kill(stopped, signal.SIGSTOP)
        assert reason(pool, GOOD) == "Timeout"
        assert not runs(stopped)
        pool.decode(GOOD)
        assert stopped not in pool.pids


def test_a_decoder_that_hangs_is_replaced_where_the_image_does_not_fit_into_the_pipe() -> None:
    with open_pool(timeout_seconds=1.0) as pool:
        pool.decode(GOOD)
        os.kill(pool.pids[0], signal.SIGSTOP)
        assert reason(pool, GOOD + bytes(2_000_000)) == "Timeout"
        assert pool.decode(GOOD).shape == (40, 40, 3)


def has_been_asked(pid: int) -> bool:
    """Whether something lies in the pipe to a decoder."""
    with Path(f"/proc/{pid}/fd/0").open("rb", buffering=0) as pipe:
        (size,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))
    return bool(size)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_image_gets_a_second_decoder_when_the_first_is_killed() -> None:
    with open_pool() as pool, ThreadPoolExecutor(1) as thread:
        pool.decode(GOOD)
        (killed,) = pool.pids
        os.kill(killed, signal.SIGSTOP)  # so that it cannot be done before it is killed
        decoded = thread.submit(pool.decode, GOOD)
        while not has_been_asked(killed):
            time.sleep(0.001)
        os.kill(killed, signal.SIGKILL)
        np.testing.assert_array_equal(decoded.result(), decode_image(GOOD, PREPROCESSING))
        assert killed not in pool.pids


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_image_that_two_decoders_die_of_is_given_up() -> None:
    endless = slow_jpeg(50_000)
    with open_pool() as pool, ThreadPoolExecutor(1) as thread:
        pool.decode(GOOD)
        busy = 2 * processor_seconds(pool.pids[0])  # has started, and does something else since
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
        assert pool.decode(GOOD).shape == (40, 40, 3)


def test_idle_decoders_that_were_killed_cost_no_image() -> None:
    with open_pool(processes=2) as pool:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(pool.decode, [saved(photo(900, 900), "PNG")] * 10))
        killed = pool.pids
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        for _ in killed:
            np.testing.assert_array_equal(pool.decode(GOOD), decode_image(GOOD, PREPROCESSING))
        assert set(pool.pids) - set(killed)


def test_memory_is_limited() -> None:
    content = png_of(np.zeros((9000, 9000, 1), np.uint8), 0)
    with open_pool(max_memory_bytes=2**28) as pool:
        assert reason(pool, content) == "OutOfMemory"
        pid = pool.pids
        assert pool.decode(GOOD).shape == (40, 40, 3)
        assert pool.pids == pid


def test_the_default_memory_is_enough_for_the_largest_image() -> None:
    limits = DecoderConfig(processes=1, max_image_pixels=3_000_000)
    with DecoderPool(PREPROCESSING, limits) as pool:
        content = saved(photo(1500, 2000).convert("RGBA"), "TIFF", compression="tiff_lzw")
        assert pool.decode(content).shape == (40, 40, 3)
        assert reason(pool, saved(photo(1500, 2001), "PNG")) == "TooManyPixels"


def test_ctrl_c_is_left_to_the_parent() -> None:
    with open_pool() as pool:
        pool.decode(GOOD)
        (pid,) = pool.pids
        os.kill(pid, signal.SIGINT)
        assert pool.decode(GOOD).shape == (40, 40, 3)
        assert pool.pids == [pid]


def test_closing_ends_what_is_being_decoded() -> None:
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
    assert not any(map(runs, pids))
    assert pool.pids == []


def test_decoders_that_cannot_start_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with open_pool() as pool, pytest.raises(CaptionlibError, match="did not start"):
        pool.decode(GOOD)


SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from captionlib.data.images.decoder_pool import DecoderConfig, DecoderPool
from captionlib.data.images.decoding import Preprocessing

good, slow, death = sys.argv[1:]
pool = DecoderPool(Preprocessing(48, 40, "bilinear", (0,), (1,)), DecoderConfig(processes=1, timeout_seconds=1.0))
print(pool.decode(Path(good).read_bytes()).shape, pool.pids[0], flush=True)
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
def test_works_in_any_program_and_ends_with_it(how: str, death: str, tmp_path: Path) -> None:
    """Scripts without a guard around their main part, `python -c` and standard input; all leave the pool open."""
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
    assert ends(int(pid))


@pytest.mark.parametrize(
    "wrong", [{"processes": 0}, {"timeout_seconds": 0}, {"max_image_pixels": 0}, {"max_memory_bytes": 1000}]
)
def test_limits_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DecoderConfig(**wrong)
