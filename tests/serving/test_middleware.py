import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from captionlib.serving.clients import identify_client
from captionlib.serving.config import ServingConfig
from captionlib.serving.middleware import RequestLimits, SecurityHeaders
from captionlib.serving.monitoring import Monitoring

CONFIG = ServingConfig(max_requests_per_client=2, body_timeout_seconds=0.1)

App = Callable[[Scope, Receive, Send], Awaitable[None]]


def make_error(request: Request, status_code: int, detail: str, headers: Mapping[str, str]) -> Response:
    return PlainTextResponse(f"{request.url.path}: {detail}", status_code, dict(headers))


def limit(app: App) -> RequestLimits:
    return RequestLimits(app, CONFIG, max_body_bytes=100, too_large_message="at most 100", make_error=make_error)


@dataclass
class Client:
    """Sends a body in parts, with a pause after each of them, and records the response."""

    parts: list[bytes] = field(default_factory=lambda: [b""])
    pause_seconds: float = 0.0
    host: str | None = "192.0.2.1"
    headers: dict[str, str] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    async def request(self, app: App) -> tuple[int, dict[str, str], str]:
        parts = list(self.parts)

        async def receive() -> Message:
            if not parts:
                return {"type": "http.disconnect"}
            part = parts.pop(0)
            if self.pause_seconds:
                await asyncio.sleep(self.pause_seconds)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Message) -> None:
            self.messages.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/x",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in self.headers.items()],
            "server": ("localhost", 80),
            "client": self.host and (self.host, 5000),
        }
        await app(scope, receive, send)
        start, *bodies = self.messages
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], headers, b"".join(body["body"] for body in bodies).decode()


async def count_bytes(scope: Scope, receive: Receive, send: Send) -> None:
    """Responds with the size of the body and the type of the message that follows it."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    following = (await receive())["type"]
    await PlainTextResponse(f"{size} {following}")(scope, receive, send)


def request(client: Client, app: App = count_bytes) -> tuple[int, dict[str, str], str]:
    return asyncio.run(client.request(limit(app)))


@pytest.mark.parametrize("parts", [[b""], [b"x" * 100], [b"x" * 60, b"x" * 40]])
def test_bodies_up_to_the_limit_are_passed_on(parts: list[bytes]) -> None:
    size = sum(map(len, parts))
    status, _, text = request(Client(parts, headers={"content-length": str(size)}))
    assert (status, text) == (200, f"{size} http.disconnect")


@pytest.mark.parametrize(
    "client",
    [
        Client([b"x" * 101]),
        Client([b"x" * 60, b"x" * 41]),
        Client([b""], headers={"content-length": "101"}),
        Client([b""], headers={"content-length": "-1"}),
        Client([b""], headers={"content-length": "many"}),
    ],
)
def test_larger_bodies_are_rejected(client: Client) -> None:
    status, headers, text = request(client)
    assert (status, text) == (413, "/x: at most 100")
    assert headers["connection"] == "close"
    assert "retry-after" not in headers


def test_rest_of_a_rejected_body_is_read_before_the_connection_is_closed() -> None:
    async def test() -> None:
        parts = [b"x" * 101, b"y", b"z"]
        events: list[str] = []

        async def receive() -> Message:
            part = parts.pop(0)
            events.append(f"receive {part[:1].decode()}")
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Message) -> None:
            body = message.get("body", b"").decode()
            events.append(
                f"{body} ({'continued' if message.get('more_body') else 'closed'})" if "body" in message else "start"
            )

        scope = {"type": "http", "method": "POST", "path": "/x", "query_string": b"", "headers": []}
        await limit(count_bytes)(scope, receive, send)
        assert events == ["receive x", "start", "/x: at most 100 (continued)", "receive y", "receive z", " (closed)"]

    asyncio.run(test())


def test_rejected_body_is_read_only_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.serving.middleware._DISCARD_SECONDS", 0.05)
    client = Client([b"x"] * 1000, pause_seconds=0.01, headers={"content-length": "1000"})
    assert request(client)[0] == 413
    assert not client.messages[-1].get("more_body")


def test_slow_bodies_are_rejected() -> None:
    status, headers, text = request(Client([b"x", b"y"], pause_seconds=0.07))
    assert (status, text) == (408, "/x: the request body arrives too slowly; try again")
    assert headers["connection"] == "close"


def test_received_bytes_extend_the_time_for_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.serving.middleware._MIN_BYTES_PER_SECOND", 0.5)
    assert request(Client([b"x", b"y"], pause_seconds=0.07))[0] == 200


def test_the_timeout_does_not_apply_after_the_body() -> None:
    async def respond_late(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0.12)
        assert (await receive())["type"] == "http.disconnect"
        await PlainTextResponse("late")(scope, receive, send)

    assert request(Client(), respond_late)[0] == 200


def test_rejection_after_the_start_of_a_response_ends_it() -> None:
    async def respond_early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        raise AssertionError("the body is too large")

    client = Client([b"x" * 101])
    request(client, respond_early)
    assert [message["type"] for message in client.messages] == ["http.response.start"]


def test_requests_of_one_client_are_limited() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def wait(scope: Scope, receive: Receive, send: Send) -> None:
            await gate.wait()
            await PlainTextResponse("done")(scope, receive, send)

        app = limit(wait)
        waiting = [asyncio.ensure_future(Client(host=host).request(app)) for host in ("192.0.2.1",) * 2 + (None,)]
        await asyncio.sleep(0)
        status, headers, text = await Client().request(app)
        assert (status, text) == (429, "/x: too many requests at once; wait for the previous ones")
        assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        other = asyncio.ensure_future(Client(host="192.0.2.2").request(app))
        await asyncio.sleep(0)
        gate.set()
        assert [status for status, _, _ in await asyncio.gather(*waiting, other)] == [200] * 4
        assert (await Client().request(app))[0] == 200
        assert not app._requests

    asyncio.run(test())


def test_failed_requests_do_not_count() -> None:
    async def fail(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError

    app = limit(fail)
    for _ in range(3):
        with pytest.raises(ValueError):  # noqa: PT011
            asyncio.run(Client().request(app))


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("testclient", "testclient"),
    ],
)
def test_client_is_identified_by_its_network(host: str, client: str) -> None:
    assert identify_client({"client": (host, 1)}) == client


@pytest.mark.parametrize("scope", [{}, {"client": None}])
def test_unknown_clients_count_as_one(scope: dict[str, Any]) -> None:
    assert identify_client(scope) == ""


@pytest.mark.parametrize("middleware", [limit, SecurityHeaders, lambda app: Monitoring(app, log_requests=True)])
def test_messages_other_than_requests_are_passed_on(middleware: Callable[[App], App]) -> None:
    passed: list[Scope] = []

    async def start(scope: Scope, _receive: Receive, _send: Send) -> None:
        passed.append(scope)

    asyncio.run(middleware(start)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert passed == [{"type": "lifespan"}]


def test_security_headers_are_exact() -> None:
    _, headers, _ = asyncio.run(Client().request(SecurityHeaders(PlainTextResponse("x"))))
    del headers["content-length"], headers["content-type"]
    assert headers == {
        "content-security-policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
    }
