import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from captionlib.serving.connections import LimitedConnection

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HALF_HEADERS = b"GET / HTTP/1.1\r\nHost: "
TIMEOUT = 0.15
BODY_BYTES = 2**24  # more than the socket buffers hold

Open = Callable[[bytes], Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class QuickConnection(LimitedConnection):
    """A connection with short timeouts."""

    max_connections = 3
    headers_timeout_seconds = TIMEOUT
    idle_timeout_seconds = TIMEOUT
    write_timeout_seconds = TIMEOUT


class PatientConnection(QuickConnection):
    """A connection with long timeouts."""

    headers_timeout_seconds = 60.0
    idle_timeout_seconds = 60.0
    write_timeout_seconds = 60.0


class IdleConnection(QuickConnection):
    """A connection that can be idle for long."""

    idle_timeout_seconds = 60.0


async def answer(_request: Request) -> Response:
    return PlainTextResponse("hello")


async def answer_late(_request: Request) -> Response:
    await asyncio.sleep(2 * TIMEOUT)
    return PlainTextResponse("late")


async def answer_at_length(_request: Request) -> Response:
    return PlainTextResponse("x" * BODY_BYTES)


CHUNKS, sent_chunks = 256, [0]


async def answer_in_chunks(_request: Request) -> Response:
    async def send() -> AsyncIterator[bytes]:
        for sent_chunks[0] in range(CHUNKS):
            yield b"x" * 2**16

    return StreamingResponse(send())


@asynccontextmanager
async def serve(connection: type[LimitedConnection]) -> AsyncIterator[Open]:
    app = Starlette(routes=[Route("/", answer), Route("/late", answer_late), Route("/long", answer_at_length)])
    app.add_route("/chunks", answer_in_chunks)
    config = uvicorn.Config(app, port=0, http=connection, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    writers = []

    async def open_connection(content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        writer.write(content)
        return reader, writer

    yield open_connection
    for writer in writers:
        writer.close()
    server.servers[0].close()


async def read_response(reader: asyncio.StreamReader, body: bytes = b"hello") -> bytes:
    return await asyncio.wait_for(reader.readuntil(body), 5)


async def is_closed(reader: asyncio.StreamReader, within_seconds: float = 5.0) -> bool:
    try:
        return not await asyncio.wait_for(reader.read(1), within_seconds)
    except ConnectionResetError:
        return True
    except asyncio.TimeoutError:
        return False


async def is_closed_while_writing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Writes a byte in each fifth of a timeout, for four timeouts or until the connection is closed."""
    for _ in range(20):
        if await is_closed(reader, TIMEOUT / 5):
            return True
        writer.write(b"x")
    return False


@pytest.mark.parametrize("sent", [b"", HALF_HEADERS, REQUEST, REQUEST + HALF_HEADERS])
def test_connection_without_a_request_is_closed(sent: bytes) -> None:
    async def test() -> None:
        async with serve(QuickConnection) as open_connection:
            reader, _ = await open_connection(sent)
            if REQUEST in sent:
                await read_response(reader)
            assert await is_closed(reader)

    asyncio.run(test())


def test_bytes_do_not_extend_the_timeout() -> None:
    async def test() -> None:
        async with serve(QuickConnection) as open_connection:
            reader, writer = await open_connection(HALF_HEADERS)
            assert await is_closed_while_writing(reader, writer)

    asyncio.run(test())


def test_requests_in_time_keep_a_connection_open() -> None:
    async def test() -> None:
        class Connection(QuickConnection):
            headers_timeout_seconds = idle_timeout_seconds = 4 * TIMEOUT  # more than a busy machine delays a request

        async with serve(Connection) as open_connection:
            reader, writer = await open_connection(REQUEST)
            for _ in range(3):
                await read_response(reader)
                await asyncio.sleep(1.5 * TIMEOUT)
                writer.write(REQUEST)
            await read_response(reader)

    asyncio.run(test())


def test_idle_connection_is_open_longer_than_one_without_a_request() -> None:
    async def test() -> None:
        async with serve(IdleConnection) as open_connection:
            reader, writer = await open_connection(REQUEST)
            await read_response(reader)
            await asyncio.sleep(2 * TIMEOUT)
            writer.write(REQUEST)
            await read_response(reader)

    asyncio.run(test())


@pytest.mark.parametrize("start", [b"G", HALF_HEADERS])
def test_incomplete_further_request_is_closed(start: bytes) -> None:
    async def test() -> None:
        async with serve(IdleConnection) as open_connection:
            reader, writer = await open_connection(REQUEST)
            await read_response(reader)
            writer.write(start)
            assert await is_closed_while_writing(reader, writer)

    asyncio.run(test())


def test_default_limits() -> None:
    limits = LimitedConnection.headers_timeout_seconds, LimitedConnection.idle_timeout_seconds
    assert limits == (15, 75), "browsers and proxies keep idle connections for up to 60 s"
    assert (LimitedConnection.write_timeout_seconds, LimitedConnection.max_connections) == (30, 1000)


def test_request_in_progress_is_not_closed() -> None:
    async def test() -> None:
        async with serve(QuickConnection) as open_connection:
            reader, _ = await open_connection(REQUEST.replace(b"/", b"/late", 1))
            await read_response(reader, b"late")

    asyncio.run(test())


def test_client_that_does_not_read_is_disconnected() -> None:
    async def test() -> None:
        lost = asyncio.Event()

        class WatchedConnection(QuickConnection):
            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                lost.set()

        async with serve(WatchedConnection) as open_connection:
            reader, writer = await open_connection(REQUEST.replace(b"/", b"/long", 1))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.wait_for(lost.wait(), 30)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            received = 0
            with suppress(ConnectionResetError):
                while content := await reader.read(2**20):
                    received += len(content)
            assert received < BODY_BYTES

    asyncio.run(test())


def test_client_that_reads_late_gets_the_whole_response() -> None:
    async def test() -> None:
        async with serve(PatientConnection) as open_connection:
            reader, writer = await open_connection(REQUEST.replace(b"/", b"/long", 1))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(2 * TIMEOUT)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(BODY_BYTES)) == BODY_BYTES

    asyncio.run(test())


def test_client_that_has_caught_up_is_not_disconnected() -> None:
    async def test() -> None:
        class Connection(PatientConnection):
            write_timeout_seconds = 4 * TIMEOUT

        async with serve(Connection) as open_connection:
            reader, writer = await open_connection(REQUEST.replace(b"/", b"/long", 1))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(TIMEOUT)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(BODY_BYTES)
            assert not await is_closed(reader, 5 * TIMEOUT)

    asyncio.run(test())


def test_new_connection_replaces_the_one_that_has_waited_longest() -> None:
    async def test() -> None:
        async with serve(PatientConnection) as open_connection:
            idle, _ = await open_connection(b"")
            await asyncio.sleep(0.01)
            used, writer = await open_connection(HALF_HEADERS)
            busy, _ = await open_connection(REQUEST.replace(b"/", b"/late", 1))
            await asyncio.sleep(0.01)
            last, _ = await open_connection(REQUEST)
            await read_response(last)
            assert await is_closed(idle)
            again, _ = await open_connection(REQUEST)
            await read_response(again)
            assert await is_closed(used), "incomplete headers are not a request"
            await read_response(busy, b"late")
            writer.close()

    asyncio.run(test())


def test_newcomers_are_closed_while_all_connections_have_requests() -> None:
    async def test() -> None:
        async with serve(PatientConnection) as open_connection:
            busy = [await open_connection(REQUEST.replace(b"/", b"/late", 1)) for _ in range(3)]
            await asyncio.sleep(0.02)
            newcomer, _ = await open_connection(b"")
            assert await is_closed(newcomer)
            for reader, _ in busy:
                await read_response(reader, b"late")
            last, _ = await open_connection(REQUEST)
            await read_response(last)

    asyncio.run(test())


def test_response_waits_for_a_client_that_does_not_read() -> None:
    async def test() -> None:
        async with serve(PatientConnection) as open_connection:
            reader, writer = await open_connection(REQUEST.replace(b"/", b"/chunks", 1))
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(1)
            assert 0 < sent_chunks[0] < CHUNKS - 1
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            while sent_chunks[0] < CHUNKS - 1:
                assert await asyncio.wait_for(reader.read(2**16), 5)

    asyncio.run(test())
