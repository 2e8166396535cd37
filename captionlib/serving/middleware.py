"""ASGI middleware that limits requests and adds security headers."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captionlib.serving.clients import identify_client
from captionlib.serving.config import ServingConfig

__all__ = ["RequestLimits", "SecurityHeaders"]

# The content security policy blocks other hosts, inline code and frames. So markup in a caption is harmless, even if it
# is not escaped.
_HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}

_MIN_BYTES_PER_SECOND = 2**14
_DISCARD_SECONDS = 5.0


MakeError = Callable[[Request, int, str, Mapping[str, str]], Response]
"""Creates an error response from a request, a status code, a message and headers."""


class RequestLimits:
    """Rejects request bodies that are too large or too slow, and clients with too many requests at once.

    `max_body_bytes` is the maximum size of a body, and `too_large_message` is the message for larger bodies.
    """

    def __init__(
        self, app: ASGIApp, config: ServingConfig, max_body_bytes: int, too_large_message: str, make_error: MakeError
    ) -> None:
        self._app = app
        self._config = config
        self._max_body_bytes = max_body_bytes
        self._too_large_message = too_large_message
        self._make_error = make_error
        self._requests: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = identify_client(scope)
        if self._requests[client] >= self._config.max_requests_per_client:
            error = _RejectedError(429, "too many requests at once; wait for the previous ones")
            await self._reject(error, scope, self._make_body(receive), send)
            return
        self._requests[client] += 1
        try:
            await self._run(scope, receive, send)
        finally:
            self._requests[client] -= 1
            if not self._requests[client]:
                del self._requests[client]

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        response_started = False
        body = self._make_body(receive)

        async def send_tracked(message: Message) -> None:
            nonlocal response_started
            response_started = True
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self._max_body_bytes:
                raise _RejectedError(413, self._too_large_message)
            await self._app(scope, body.receive, send_tracked)
        except _RejectedError as error:
            if not response_started:
                await self._reject(error, scope, body, send)

    def _make_body(self, receive: Receive) -> "_LimitedBody":
        return _LimitedBody(receive, self._config.body_timeout_seconds, self._max_body_bytes, self._too_large_message)

    async def _reject(self, error: "_RejectedError", scope: Scope, body: "_LimitedBody", send: Send) -> None:
        """Sends an error, reads and discards the body for a few seconds, and then closes the connection.

        The body may be too large to read. If the connection closed at once, a client that is still sending its body
        would not receive the error.
        """

        async def send_and_discard_body(message: Message) -> None:
            is_last = message["type"] == "http.response.body"
            await send({**message, "more_body": True} if is_last else message)
            if is_last:
                await body.discard()
                await send({**message, "body": b""})

        headers = {"connection": "close"} | ({"retry-after": "1"} if error.status_code == 429 else {})
        response = self._make_error(Request(scope), error.status_code, error.detail, headers)
        await response(scope, body.receive, send_and_discard_body)


class _LimitedBody:
    def __init__(self, receive: Receive, timeout_seconds: float, max_bytes: int, too_large_message: str) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._too_large_message = too_large_message
        self._received = 0
        self._is_complete = False
        self._deadline = _now() + timeout_seconds

    async def receive(self) -> Message:
        """Returns the next message. Raises _RejectedError if the body exceeds a limit."""
        if self._is_complete:  # waits until the client disconnects
            return await self._receive()
        remaining = self._deadline + self._received / _MIN_BYTES_PER_SECOND - _now()
        try:
            message = await asyncio.wait_for(self._receive(), remaining)
        except asyncio.TimeoutError:
            raise _RejectedError(408, "the request body arrives too slowly; try again") from None
        self._received += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._received > self._max_bytes:
            raise _RejectedError(413, self._too_large_message)
        return message

    async def discard(self) -> None:
        deadline = _now() + _DISCARD_SECONDS
        with suppress(asyncio.TimeoutError):
            while not self._is_complete:
                message = await asyncio.wait_for(self._receive(), deadline - _now())
                self._is_complete = not message.get("more_body", False)


def _now() -> float:
    return asyncio.get_running_loop().time()


class _RejectedError(BaseException):
    """A request was rejected. This class is not an Exception, so the application's error handlers do not catch it."""

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code = status_code
        self.detail = detail


class SecurityHeaders:
    """Adds security headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self._headers]}
            await send(message)

        await self._app(scope, receive, send_with_headers)
