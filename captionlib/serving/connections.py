"""Limits on connections that apply before a request reaches the application."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["LimitedConnection"]


class LimitedConnection(H11Protocol):
    """A connection that is closed if the client is too slow. uvicorn alone would wait for a slow client forever.

    The server keeps idle connections for 75 seconds. Most clients and proxies close them after at most 60 seconds. If
    the server closed a connection first, a request that a client is sending at that moment would fail.

    If there are too many connections, a new connection replaces the one that has waited longest for a request.
    Therefore, clients that open many connections and send no requests cannot lock out other clients.
    """

    max_connections = 1000  # per process
    headers_timeout_seconds = 15.0  # from the start of a connection, or of a further request, to the last header
    idle_timeout_seconds = 75.0  # from the end of a response to the next request
    write_timeout_seconds = 30.0  # for a client to receive what is waiting in the send buffer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = self.idle_timeout_seconds  # type: ignore[assignment]  # any number is accepted
        self._waiting_since = self.loop.time()
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def waiting_since(self) -> float | None:
        """When the connection began to wait for a request, or None if a request is in progress."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        return self._waiting_since if is_waiting else None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_headers_timer()
        if len(self.connections) > self.max_connections:
            self._close_longest_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_headers_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._headers_timer is None:  # the first byte of a further request
            self._start_headers_timer()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._cancel_headers_timer()
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _cancel_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _start_headers_timer(self) -> None:
        self._waiting_since = self.loop.time()
        self._headers_timer = self.loop.call_later(self.headers_timeout_seconds, self._close_if_waiting)

    def _close_if_waiting(self) -> None:
        if self.waiting_since is not None:
            self.transport.abort()

    def _close_longest_waiting(self) -> None:
        waiting = {
            connection: connection.waiting_since
            for connection in self.connections
            if isinstance(connection, LimitedConnection) and connection.waiting_since is not None
        }
        longest = min(waiting, key=waiting.__getitem__)  # not empty, because this connection is waiting
        longest.transport.abort()
        self.connections.discard(longest)
