"""A proxy for an object store that injects faults and records requests."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import aiohttp
from aiohttp import web


class Fault(Enum):
    """A fault that happens to a request."""

    ERROR = auto()  # the request is not executed; status 500
    THROTTLE = auto()  # the request is not executed; status 503 SlowDown
    HANG = auto()  # the request is not executed; the response is delayed beyond the timeout
    CUT = auto()  # the request is executed; the connection breaks during the response
    SLOW = auto()  # the request is executed; the response arrives slowly


@dataclass(frozen=True)
class Request:
    """A recorded request: method, bucket and key, the injected fault and the status."""

    method: str
    path: str
    fault: Fault | None
    status: int


def never(_method: str, _path: str) -> Fault | None:
    return None


class FaultyProxy:
    """Forwards requests to a store in its own thread. `choose` selects faults and may change at any time."""

    def __init__(self, store: str) -> None:
        self.choose: Callable[[str, str], Fault | None] = never
        self.requests: list[Request] = []
        self._store = store
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        self.url: str = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def succeeded(self, method: str) -> list[str]:
        """Returns the paths of the successful requests of a method, in order."""
        return [request.path for request in self.requests if request.method == method and 200 <= request.status < 300]

    async def _start(self) -> str:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._respond)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def _stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        fault = self.choose(request.method, request.path)
        status, headers, body = await self._forward(request, content, fault)
        self.requests.append(Request(request.method, request.path, fault, status))
        if fault is Fault.HANG:
            await asyncio.sleep(1.5)
        response = web.StreamResponse(status=status, headers=headers)
        if request.method != "HEAD":
            response.content_length = len(body)
        await response.prepare(request)
        if fault is Fault.CUT:
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.abort()
        elif fault is Fault.SLOW:
            for start in range(0, len(body), 1 + len(body) // 4):
                await asyncio.sleep(0.02)
                await response.write(body[start : start + 1 + len(body) // 4])
        elif request.method != "HEAD":
            await response.write(body)
        return response

    async def _forward(
        self, request: web.Request, content: bytes, fault: Fault | None
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns the status, headers and body of the response."""
        if fault in (Fault.ERROR, Fault.THROTTLE, Fault.HANG):
            code = "SlowDown" if fault is Fault.THROTTLE else "InternalError"
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            return 503 if fault is Fault.THROTTLE else 500, {"Content-Type": "application/xml"}, body
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        async with self._session.request(
            request.method, self._store + request.raw_path, headers=headers, data=content, allow_redirects=False
        ) as answer:
            response_headers = {
                name: value
                for name, value in answer.headers.items()
                if name not in ("Transfer-Encoding", "Connection", "Server", "Date")
                and (name != "Content-Length" or request.method == "HEAD")
            }
            return answer.status, response_headers, await answer.read()
