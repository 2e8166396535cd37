import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from captionlib.errors import BusyError
from captionlib.serving.fair_thread_pool import FairThreadPool

SHORT = 0.05


class Recorder:
    """Functions that record their names and return when the test allows it."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.gate = threading.Semaphore(0)

    def make(self, name: str) -> Callable[[], str]:
        def record() -> str:
            self.started.append(name)
            assert self.gate.acquire(timeout=10)
            return name

        return record

    async def wait_until_started(self, count: int) -> None:
        while len(self.started) < count:
            await asyncio.sleep(0.001)

    def open(self) -> None:
        self.gate.release(1000)


def open_pool(
    threads: int = 1, threads_per_key: int = 9, max_waiting: int = 100, max_wait_seconds: float = 10
) -> FairThreadPool:
    return FairThreadPool("test", threads, threads_per_key, max_waiting, max_wait_seconds)


def run(test: Callable[[Recorder], Coroutine[Any, Any, None]]) -> None:
    recorder = Recorder()
    try:
        asyncio.run(asyncio.wait_for(test(recorder), 10))
    finally:
        recorder.open()


async def start(*calls: Coroutine[Any, Any, str]) -> list[asyncio.Task[str]]:
    """Starts calls and lets each of them wait for its turn."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


async def outcomes(calls: list[asyncio.Task[str]]) -> list[str]:
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [result if isinstance(result, str) else type(result).__name__ for result in results]


def test_result_and_exception_are_returned() -> None:
    def fail() -> str:
        raise ValueError("x")

    async def test(_recorder: Recorder) -> None:
        with open_pool() as pool:
            with pytest.raises(ValueError, match="x"):
                await pool.run("a", fail)
            assert await pool.run("a", lambda: threading.current_thread().name) == "test_0"

    run(test)


def test_keys_take_turns() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool() as pool:
            names = ["a1", "a2", "a3", "b1", "b2", "c1"]
            calls = await start(*(pool.run(name[0], recorder.make(name)) for name in names))
            recorder.open()
            assert await outcomes(calls) == names
            assert recorder.started == ["a1", "a2", "b1", "c1", "a3", "b2"]

    run(test)


def test_one_key_uses_only_its_threads() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool(threads=4, threads_per_key=2) as pool:
            calls = await start(*(pool.run("a", recorder.make(f"a{number}")) for number in range(4)))
            await recorder.wait_until_started(2)
            await asyncio.sleep(SHORT)
            assert recorder.started == ["a0", "a1"]
            calls += await start(pool.run("b", recorder.make("b0")))
            await recorder.wait_until_started(3)
            recorder.open()
            assert await outcomes(calls) == ["a0", "a1", "a2", "a3", "b0"]

    run(test)


def test_no_more_functions_than_threads_run() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool(threads=2) as pool:
            calls = await start(*(pool.run(str(number), recorder.make(str(number))) for number in range(5)))
            await recorder.wait_until_started(2)
            await asyncio.sleep(SHORT)
            assert len(recorder.started) == 2
            recorder.open()
            assert len(await outcomes(calls)) == 5

    run(test)


def test_full_queue_rejects_the_latest_call_of_the_key_with_the_most() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool(max_waiting=3) as pool:
            running = await start(pool.run("x", recorder.make("x")))
            greedy = await start(*(pool.run("a", recorder.make(f"a{number}")) for number in range(3)))
            modest = await start(pool.run("b", recorder.make("b")))
            await recorder.wait_until_started(1)
            await asyncio.sleep(SHORT)
            assert [call.done() for call in greedy + modest] == [False, False, True, False]
            recorder.open()
            assert await outcomes(running + greedy + modest) == ["x", "a0", "a1", "BusyError", "b"]

    run(test)


def test_newcomer_is_rejected_at_once_if_no_key_has_more() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool(max_waiting=2) as pool:
            calls = await start(*(pool.run(key, recorder.make(key)) for key in "abcd"))
            with pytest.raises(BusyError, match="try again in a few seconds"):
                await calls[3]
            recorder.open()
            assert await outcomes(calls) == ["a", "b", "c", "BusyError"]

    run(test)


def test_call_that_waits_too_long_is_rejected() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool(max_wait_seconds=SHORT) as pool:
            calls = await start(pool.run("a", recorder.make("a")), pool.run("b", recorder.make("b")))
            with pytest.raises(BusyError):
                await calls[1]
            recorder.open()
            assert await outcomes(calls) == ["a", "BusyError"]
            assert await pool.run("b", recorder.make("b2")) == "b2"
            assert recorder.started == ["a", "b2"]

    run(test)


async def _cancel_waiting(calls: list[asyncio.Task[str]]) -> None:
    calls[1].cancel()


async def _cancel_running(calls: list[asyncio.Task[str]]) -> None:
    calls[0].cancel()


@pytest.mark.parametrize(("cancel", "expected"), [(_cancel_waiting, ["a", "c"]), (_cancel_running, ["a", "b", "c"])])
def test_cancelled_calls_do_not_use_up_threads(
    cancel: Callable[[list[asyncio.Task[str]]], Awaitable[None]], expected: list[str]
) -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool() as pool:
            calls = await start(*(pool.run(key, recorder.make(key)) for key in "abc"))
            await recorder.wait_until_started(1)
            await cancel(calls)
            await asyncio.sleep(SHORT)
            assert recorder.started == ["a"], "the thread is in use until the function returns"
            recorder.open()
            assert (await outcomes(calls)).count("CancelledError") == 1
            assert await pool.run("d", recorder.make("d")) == "d"
            assert recorder.started == [*expected, "d"]

    run(test)


def test_call_cancelled_at_its_turn_passes_the_turn_on() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool() as pool:
            calls = await start(pool.run("a", recorder.make("a")))  # has its turn, but has not noticed it yet
            calls[0].cancel()
            recorder.open()
            assert await pool.run("b", recorder.make("b")) == "b"
            assert recorder.started == ["b"]

    run(test)


def test_nothing_is_kept_for_keys_that_are_gone() -> None:
    async def test(recorder: Recorder) -> None:
        with open_pool(threads=2, max_waiting=2, max_wait_seconds=SHORT) as pool:
            calls = await start(*(pool.run(key, recorder.make(key)) for key in "aabbccdd"))
            await asyncio.sleep(2 * SHORT)
            recorder.open()
            await outcomes(calls)
            assert not pool._waiting
            assert not pool._running

    run(test)
