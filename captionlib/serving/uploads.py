"""Processes uploaded images in threads that clients share fairly."""

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
        self._threads = FairThreadPool(
            "uploads",
            threads=config.max_concurrent_uploads,
            threads_per_key=config.max_concurrent_uploads,
            max_waiting=config.max_waiting_uploads,
            max_wait_seconds=_MAX_WAIT_SECONDS,
        )

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    async def process(self, request: Request, function: Callable[[], Result]) -> Result:
        """Calls `function` in a thread when it is the turn of the client that sent `request`. Returns its result.

        Raises:
            BusyError: too many images are waiting, or this one has waited too long.
            ClientDisconnect: the client has disconnected, so no result is needed.
        """
        call = asyncio.ensure_future(self._threads.run(identify_client(request.scope), function))
        disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait([call, disconnect], return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise ClientDisconnect
            return call.result()
        finally:
            call.cancel()
            disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
