import asyncio
import threading
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from captionlib.errors import BusyError
from captionlib.serving.config import ServingConfig
from captionlib.serving.fair_thread_pool import FairThreadPool
from captionlib.serving.uploads import create_upload_pool, process_upload


class Connection:
    """A client that has sent its request and can disconnect."""

    def __init__(self, host: str = "192.0.2.1") -> None:
        self.gone = asyncio.Event()
        self.request = Request({"type": "http", "client": (host, 1), "headers": []}, self._receive)
        self._sent = False

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


def test_result_and_exceptions_are_returned() -> None:
    def fail() -> None:
        raise ValueError("x")

    async def test(pool: FairThreadPool) -> None:
        assert await process_upload(pool, Connection().request, lambda: 5) == 5
        with pytest.raises(ValueError, match="x"):
            await process_upload(pool, Connection().request, fail)

    with create_upload_pool(ServingConfig()) as pool:
        asyncio.run(test(pool))


def test_image_of_a_client_that_disconnects_is_not_processed() -> None:
    processed: list[str] = []
    gate = threading.Semaphore(0)

    async def test(pool: FairThreadPool) -> None:
        first, second, third = Connection(), Connection(), Connection()

        def process(name: str) -> str:
            processed.append(name)
            assert gate.acquire(timeout=10)
            return name

        names = {"first": first, "second": second, "third": third}
        tasks = [
            asyncio.ensure_future(process_upload(pool, connection.request, lambda name=name: process(name)))
            for name, connection in names.items()
        ]
        await asyncio.sleep(0.02)
        second.gone.set()
        with pytest.raises(ClientDisconnect):
            await tasks[1]
        gate.release(3)
        assert await asyncio.gather(tasks[0], tasks[2]) == ["first", "third"]
        assert processed == ["first", "third"]

    with create_upload_pool(ServingConfig(max_concurrent_uploads=1)) as pool:
        asyncio.run(test(pool))


def test_clients_take_turns() -> None:
    processed: list[str] = []
    gate = threading.Semaphore(0)

    def process(name: str) -> None:
        assert gate.acquire(timeout=10)
        processed.append(name)

    async def test(pool: FairThreadPool) -> None:
        hosts = ["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"]
        tasks = [
            asyncio.ensure_future(process_upload(pool, Connection(host).request, lambda host=host: process(host)))
            for host in hosts
        ]
        await asyncio.sleep(0.02)
        with pytest.raises(BusyError):
            await tasks[2]
        gate.release(4)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert processed == ["192.0.2.1", "192.0.2.1", "192.0.2.2"]

    with create_upload_pool(ServingConfig(max_concurrent_uploads=1, max_waiting_uploads=2)) as pool:
        asyncio.run(test(pool))
