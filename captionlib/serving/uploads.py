"""Processes uploaded images in turn."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from captionlib.serving.clients import identify_client
from captionlib.serving.config import ServingConfig
from captionlib.serving.fair_thread_pool import FairThreadPool

__all__ = ["Uploads"]

Result = TypeVar("Result")

_MAX_WAIT_SECONDS = 60.0


class Uploads:
    """Processes uploaded images in a few threads. Clients take turns. Exiting the context stops the threads."""

    def __init__(self, config: ServingConfig) -> None:
        threads = config.max_concurrent_uploads
        self._threads = FairThreadPool("uploads", threads, threads, config.max_waiting_uploads, _MAX_WAIT_SECONDS)

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    async def process(self, request: Request, function: Callable[[], Result]) -> Result:
        """Calls a function in a thread when it is the client's turn.

        Raises:
            BusyError: too many images are waiting.
            ClientDisconnect: the client has disconnected, so no result is needed.
        """
        result = asyncio.ensure_future(self._threads.run(identify_client(request.scope), function))
        disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait([result, disconnect], return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ClientDisconnect
            return result.result()
        finally:
            result.cancel()
            disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
