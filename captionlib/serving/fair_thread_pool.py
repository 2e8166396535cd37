"""A bounded thread pool whose clients take turns."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from captionlib.errors import BusyError

__all__ = ["FairThreadPool"]

Result = TypeVar("Result")


class FairThreadPool:
    """Runs functions in threads. Each call has a key, such as a client, and keys take turns.

    If more than `max_waiting` calls wait, the latest call of the key with the most waiting calls is rejected, so no key
    can lock out others. `threads_per_key` limits the functions that run at once for the same key. All methods must be
    called in the same event loop.
    """

    def __init__(
        self, name: str, threads: int, threads_per_key: int, max_waiting: int, max_wait_seconds: float
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free_threads = threads
        self._threads_per_key = threads_per_key
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # keys in the order of their next turns

    def __enter__(self) -> "FairThreadPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()  # waits for running functions to return

    async def run(self, key: str, function: Callable[[], Result]) -> Result:
        """Waits for a turn, runs a function in a thread, and returns its result.

        Raises:
            BusyError: too many calls wait, or the call has waited too long.
        """
        await self._wait_for_turn(key)
        loop = asyncio.get_running_loop()

        def release(_: Future[Result]) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._release, key)

        # If the caller is canceled, the thread stays in use until the function returns.
        running = self._executor.submit(function)
        running.add_done_callback(release)
        return await asyncio.wrap_future(running)

    async def _wait_for_turn(self, key: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        self._start_turns()
        if sum(map(len, self._waiting.values())) > self._max_waiting:
            self._reject_latest(key)
        try:
            await asyncio.wait([turn], timeout=self._max_wait_seconds)
        except asyncio.CancelledError:
            if turn.done() and turn.exception() is None:
                self._release(key)
            else:
                self._stop_waiting(key, turn)
            raise
        if not turn.done():
            self._stop_waiting(key, turn)
            raise _busy()
        turn.result()

    def _start_turns(self) -> None:
        while self._free_threads and (key := self._find_next_key()) is not None:
            waiting = self._waiting.pop(key)
            waiting.popleft().set_result(None)
            if waiting:
                self._waiting[key] = waiting  # behind all other keys
            self._running[key] += 1
            self._free_threads -= 1

    def _find_next_key(self) -> str | None:
        return next((key for key in self._waiting if self._running[key] < self._threads_per_key), None)

    def _reject_latest(self, latest_key: str) -> None:
        """Rejects the latest call of the key with the most waiting calls. In a tie, `latest_key` is chosen."""
        longest = max(self._waiting, key=lambda key: (len(self._waiting[key]), key == latest_key))
        turn = self._waiting[longest][-1]
        self._stop_waiting(longest, turn)
        turn.set_exception(_busy())

    def _stop_waiting(self, key: str, turn: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(key, deque())
        with suppress(ValueError):  # the call has already been rejected
            waiting.remove(turn)
        if not waiting:
            self._waiting.pop(key, None)

    def _release(self, key: str) -> None:
        self._free_threads += 1
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._start_turns()


def _busy() -> BusyError:
    return BusyError("the server is busy; try again in a few seconds")
