"""Processes uploaded images in threads that clients share fairly."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from captionlib.serving.clients import identify_client
from captionlib.serving.config import ServingConfig
from captionlib.serving.fair_thread_pool import FairThreadPool

__all__ = ["create_upload_pool", "process_upload"]

Result = TypeVar("Result")

_MAX_WAIT_SECONDS = 60.0


def create_upload_pool(config: ServingConfig) -> FairThreadPool:
    threads = config.max_concurrent_uploads
    return FairThreadPool("uploads", threads, threads, config.max_waiting_uploads, _MAX_WAIT_SECONDS)


async def process_upload(pool: FairThreadPool, request: Request, function: Callable[[], Result]) -> Result:
    """Calls `function` in a thread when it is the turn of the client that sent `request`. Returns its result.

    Raises:
        BusyError: too many images are waiting, or this one has waited too long.
        ClientDisconnect: the client has disconnected, so no result is needed.
    """
    call = asyncio.ensure_future(pool.run(identify_client(request.scope), function))
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
