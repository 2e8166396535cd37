import ipaddress
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from captionlib.data.images import public_hosts
from captionlib.data.images.addresses import IMAGE_PROTOCOLS, ImageAddress, image_exists, parse_image_address
from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.data.images.public_hosts import is_private_address
from captionlib.errors import ConfigError, FetchError
from captionlib.storage.file_systems import UNSAFE_PROTOCOLS

CONTENT = b"an image" * 100
SECRET = "hunter2-from-the-environment"
TEMPLATE = "{{ lipsum.__globals__['os'].environ['CAPTIONLIB_SECRET'] }}"


class Server(ThreadingHTTPServer):
    """Serves `answers`, redirects by `redirects` and records the requested paths."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), Handler)
        self.url = f"http://{host}:{self.server_port}"
        self.answers: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.requested: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        content = self.server.answers.get(self.path, CONTENT)
        target = self.server.redirects.get(self.path)
        self.send_response(200 if target is None else 302)
        if target is not None:
            self.send_header("Location", target)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def run(server: Server) -> Iterator[Server]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    yield from run(Server())


@pytest.fixture
def public_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server at 127.0.0.2, which counts as public in the test."""
    monkeypatch.setattr(
        public_hosts, "is_private_address", lambda host: host != "127.0.0.2" and is_private_address(host)
    )
    yield from run(Server("127.0.0.2"))


@pytest.fixture
def fetcher() -> Iterator[ImageFetcher]:
    with ImageFetcher(FetchConfig(attempts=1)) as fetcher:
        yield fetcher


@pytest.fixture
def public_fetcher() -> Iterator[ImageFetcher]:
    with ImageFetcher(FetchConfig(attempts=3, backoff_seconds=0.01, allow_private_hosts=False)) as fetcher:
        yield fetcher


def failure(fetcher: ImageFetcher, uri: str) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetcher.fetch(uri)
    return caught.value


@pytest.mark.parametrize(
    "address",
    [
        "reference://x::{url}/refs.json",
        "reference::{url}/refs.json",
        "REFERENCE://x::{url}/refs.json",
        "simplecache::reference://x::{url}/refs.json",
        "reference://x::{url}/refs.json#bytes=0-10",
        "reference://x::{url}/refs.json#row=0&column=image",
    ],
)
def test_reference_files_are_never_requested(
    fetcher: ImageFetcher, server: Server, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("CAPTIONLIB_SECRET", SECRET)
    references = {
        "version": 1,
        "templates": {"u": f"{server.url}/{TEMPLATE}"},
        "refs": {"x": ["{{u}}"]},
    }
    server.answers["/refs.json"] = json.dumps(references).encode()
    error = failure(fetcher, address.format(url=server.url))
    assert error.reason == "BadAddress"
    assert SECRET not in str(error)
    assert server.requested == []


@pytest.mark.parametrize(
    "address",
    [
        "simplecache::{url}/a.jpg",
        "filecache::{url}/a.jpg",
        "blockcache::{url}/a.jpg",
        "cached::{url}/a.jpg",
        "dir::{url}",
        "zip://a.jpg::{url}/a.zip",
        "tar://a.jpg::{url}/a.tar",
        "libarchive://a.jpg::{url}/a.7z",
        "file://x::{url}/a.jpg",
        "s3://bucket/x::{url}/a.jpg",
        "jupyter://127.0.0.1/a.jpg",
        "github://owner:repo@main/a.jpg",
        "ftp://127.0.0.1/a.jpg",
        "memory://a.jpg",
        "nonsense://a.jpg",
        "http://",
        "http:///a.jpg",
        "http://[::1/a.jpg",
        "http://host/a\0.jpg",
    ],
)
def test_chains_and_other_protocols_are_rejected(fetcher: ImageFetcher, server: Server, address: str) -> None:
    error = failure(fetcher, address.format(url=server.url))
    assert error.reason == "BadAddress"
    assert "expected" in str(error)
    assert server.requested == []


def test_web_address_may_contain_double_colons(fetcher: ImageFetcher, server: Server) -> None:
    assert fetcher.fetch(f"{server.url}/a::b.jpg") == CONTENT
    assert fetcher.fetch(f"{server.url}/a::{server.url}/b.jpg") == CONTENT
    assert server.requested == ["/a::b.jpg", f"/a::{server.url}/b.jpg"]


def test_path_may_contain_double_colons(fetcher: ImageFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a::b.jpg").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    for address in ("a::b.jpg", "./a::b.jpg", f"{tmp_path}/a::b.jpg", f"file://{tmp_path}/a::b.jpg"):
        assert fetcher.fetch(address) == CONTENT


def test_aliases_of_allowed_protocols_are_allowed() -> None:
    for spelled, usual in {
        "s3a": "s3",
        "gcs": "gs",
        "abfss": "abfs",
        "az": "abfs",
        "local": "file",
        "S3": "s3",
    }.items():
        assert parse_image_address(f"{spelled}://{'' if usual == 'file' else 'bucket'}/a.jpg").file.protocol == usual
    assert parse_image_address("s3://bucket/a.tar#bytes=1-9") == ImageAddress(
        parse_image_address("s3://bucket/a.tar").file, span=(1, 9)
    )
    assert parse_image_address("a.parquet#row=3&column=image.bytes").cell == (3, "image.bytes")


def test_protocols_are_configurable(server: Server, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/allowed.jpg", CONTENT)
    with ImageFetcher(FetchConfig(protocols=("memory", "s3a"))) as fetcher:
        assert fetcher.fetch("memory://allowed.jpg") == CONTENT
        assert failure(fetcher, f"{server.url}/a.jpg").reason == "BadAddress"
        assert failure(fetcher, str(tmp_path)).reason == "BadAddress"
        assert failure(fetcher, f"file://{tmp_path}").reason == "BadAddress"
    assert parse_image_address("s3://bucket/a", ("s3a",)).file.protocol == "s3"
    assert server.requested == []


@pytest.mark.parametrize("protocol", [*sorted(UNSAFE_PROTOCOLS), "nonsense", "HTTP"])
def test_unsafe_and_unknown_protocols_cannot_be_allowed(protocol: str) -> None:
    with pytest.raises(ConfigError, match=f"protocols: .*, got '{protocol}', which is unknown or unsafe; remove it"):
        FetchConfig(protocols=(*IMAGE_PROTOCOLS, protocol))


@given(st.text(), st.sampled_from(["", *sorted(UNSAFE_PROTOCOLS)]), st.sampled_from(["", "::", "://"]))
def test_parsed_addresses_are_allowed_and_not_chained(text: str, protocol: str, separator: str) -> None:
    try:
        outcome = parse_image_address(f"{protocol}{separator}{text}").file.protocol
    except FetchError as error:
        outcome = error.reason
    assert outcome in {*IMAGE_PROTOCOLS, "BadAddress"}


def test_image_exists_opens_no_rejected_address(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert image_exists(f"{tmp_path}/a.jpg")
    assert image_exists(f"file://{tmp_path}/a.jpg#bytes=0-1")
    assert not image_exists(f"{tmp_path}/b.jpg")
    assert image_exists(f"{server.url}/a.jpg")
    with pytest.raises(FetchError):
        image_exists(f"reference://x::{server.url}/refs.json")
    assert server.requested == []


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "127.0.1", "0x7f000001", "0x7f.1", "2130706433", "017700000001", "0177.0.0.1"),
        *(
            "0.0.0.0",
            "0",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
        ),
        *("localhost", "LOCALHOST", "localhost.", "127.0.0.1."),
    ],
)
def test_loopback_is_rejected_in_every_notation(public_fetcher: ImageFetcher, server: Server, host: str) -> None:
    reason = failure(public_fetcher, f"http://{host}:{server.server_port}/a.jpg").reason
    assert reason in {"ForbiddenHost", "BadAddress", "ConnectionFailed"}
    assert server.requested == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::]", "0.0.0.0"])
def test_rejected_host_has_its_own_reason(public_fetcher: ImageFetcher, server: Server, host: str) -> None:
    error = failure(public_fetcher, f"http://{host}:{server.server_port}/a.jpg")
    assert error.reason == "ForbiddenHost"
    assert "--allow-private-hosts" in str(error)


def test_cells_and_ranges_are_not_read_from_private_hosts(public_fetcher: ImageFetcher, server: Server) -> None:
    assert failure(public_fetcher, f"{server.url}/a.tar#bytes=0-4").reason == "ForbiddenHost"
    assert failure(public_fetcher, f"{server.url}/a.parquet#row=0&column=image").reason == "ForbiddenHost"
    assert failure(public_fetcher, "hdfs://127.0.0.1:8020/a.jpg").reason == "ForbiddenHost"
    assert server.requested == []


def test_private_hosts_are_allowed_by_default(fetcher: ImageFetcher, server: Server) -> None:
    assert fetcher.fetch(f"{server.url}/a.jpg") == CONTENT


@pytest.mark.parametrize("target", ["{url}/secret", "http://localhost:{port}/secret", "//127.0.0.1:{port}/secret"])
def test_redirects_to_private_hosts_are_rejected(
    public_fetcher: ImageFetcher, public_server: Server, server: Server, target: str
) -> None:
    public_server.redirects["/moved.jpg"] = target.format(url=server.url, port=server.server_port)
    public_server.redirects["/twice.jpg"] = "/moved.jpg"
    assert public_fetcher.fetch(f"{public_server.url}/a.jpg") == CONTENT
    for name in ("moved", "twice"):
        error = failure(public_fetcher, f"{public_server.url}/{name}.jpg")
        assert error.reason == "ForbiddenHost"
        assert "secret" not in str(error)
    assert server.requested == []
    assert public_server.requested == ["/a.jpg", "/moved.jpg", "/twice.jpg", "/moved.jpg"]  # without a second attempt


def test_connected_address_is_checked_after_dns_rebinding(
    public_fetcher: ImageFetcher, public_server: Server, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host name resolves to a public address first and to loopback afterwards."""
    answers = iter(["127.0.0.2", "127.0.0.1"])
    real = socket.getaddrinfo

    def rebind(host: str, port: int, *rest: object, **options: object) -> object:
        return real(next(answers) if host == "rebound.test" else host, port, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    assert public_fetcher.fetch(f"http://rebound.test:{public_server.server_port}/a.jpg") == CONTENT
    assert failure(public_fetcher, f"http://rebound.test:{server.server_port}/a.jpg").reason == "ForbiddenHost"
    assert server.requested == []


@pytest.mark.parametrize("options", [{"proxy": "http://p"}, {"client_kwargs": {"trust_env": True}}])
def test_proxies_are_rejected_without_private_hosts(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "http", options)
    with pytest.raises(ConfigError, match="proxy"):
        ImageFetcher(FetchConfig(allow_private_hosts=False))
    ImageFetcher(FetchConfig())


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("93.184.215.14", False),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", False),
        ("::ffff:93.184.215.14", False),
        ("127.8.9.10", True),
        ("10.0.0.1", True),
        ("172.16.0.1", True),
        ("192.168.1.1", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("224.0.0.1", True),
        ("240.0.0.1", True),
        ("255.255.255.255", True),
        ("0.0.0.0", True),
        ("::", True),
        ("::1", True),
        ("fe80::1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("fec0::1", True),
        ("ff02::1", True),
        ("::ffff:169.254.169.254", True),
        ("2002:7f00:1::", True),
        ("64:ff9b::a9fe:a9fe", True),
        ("127.1", True),
        ("2130706433", True),
        ("localhost", True),
    ],
)
def test_is_private_address(host: str, private: bool) -> None:
    assert is_private_address(host) == private


@given(st.ip_addresses(v=4))
def test_embedded_ipv4_address_decides_privacy(host: ipaddress.IPv4Address) -> None:
    assert (
        is_private_address(f"::ffff:{host}") == is_private_address(str(host)) == is_private_address(f"64:ff9b::{host}")
    )


def test_failures_quote_no_file_content(fetcher: ImageFetcher, tmp_path: Path) -> None:
    rows = pa.table({"secret-column": [SECRET], "list": [[{SECRET: 1}]]})
    pq.write_table(rows, tmp_path / "a.parquet")
    (tmp_path / "passwd").write_text(f"{SECRET}:x:0:0\n" * 10)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "passwd")
    for address in (
        f"{tmp_path}/a.parquet#row=0&column=image",
        f"{tmp_path}/a.parquet#row=0&column=secret-column.x",
        f"{tmp_path}/link.jpg#row=0&column=image",
        f"{tmp_path}/link.jpg#bytes=0-100000",
    ):
        message = str(failure(fetcher, address))
        assert "hunter2" not in message
        assert "list" not in message


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-hunter2\r\n",
        b"HTTP/1.1 404 hunter2\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: ftp://hunter2/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[hunter2\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhunter2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: hunter2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 7\r\n\r\nhunter2",
    ],
)
@pytest.mark.parametrize("part", ["", "#bytes=0-4", "#row=0&column=image"])
def test_failures_quote_no_server_response(fetcher: ImageFetcher, answer: bytes, part: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        port = server_socket.getsockname()[1]

        def serve() -> None:
            while True:
                try:
                    connection, _ = server_socket.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(2**16)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        error = failure(fetcher, f"http://127.0.0.1:{port}/a.jpg{part}")
        server_socket.shutdown(socket.SHUT_RDWR)
    assert "hunter2" not in str(error)
    assert "hunter2" not in error.reason


def test_parquet_special_files_are_rejected(fetcher: ImageFetcher, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert failure(fetcher, f"{tmp_path}/pipe#row=0&column=image").reason == "NotAFile"


def test_addresses_of_other_spellings_are_read(fetcher: ImageFetcher, server: Server, tmp_path: Path) -> None:
    (tmp_path / "with space#row=1&column=y").write_bytes(CONTENT)
    assert bytes(fetcher.fetch(f"  HTTP{server.url.removeprefix('http')}/a.jpg ")) == CONTENT
    assert bytes(fetcher.fetch(f"file://{tmp_path}/with%20space%23row=1&column=y")) == CONTENT
    assert bytes(fetcher.fetch(f"file://localhost{tmp_path}/with%20space%23row=1&column=y")) == CONTENT
    assert bytes(fetcher.fetch(f"{tmp_path}/with space#row=1&column=y")) == CONTENT
    assert bytes(fetcher.fetch(f"{tmp_path}/with space#row=1&column=y#bytes=0-5")) == CONTENT[:5]
    assert bytes(fetcher.fetch(f"FILE://{tmp_path}/with%20space%23row=1&column=y#bytes=0-5")) == CONTENT[:5]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("//host/x.jpg", "which lacks a protocol; add https:"),
        ("data:image/png;base64,AAAA", "got the data URI 'data:image/png;base64,AAAA'; write it to a file"),
        ("DATA:,x", "got the data URI"),
        ("data:image/png," + "A" * 10_000, "got the data URI"),
        ("file:///a%00b", "null character"),
        ("file://host/x.jpg", "expected file:///PATH, a file on this machine, got the host 'host'"),
        ("FILE://x.jpg", "got the host 'x.jpg'"),
        (" reference://x::http://127.0.0.1/refs.json", "got a chain of them"),
    ],
)
def test_address_that_is_no_file_is_refused_clearly(fetcher: ImageFetcher, uri: str, message: str) -> None:
    error = failure(fetcher, uri)
    assert error.reason == "BadAddress"
    assert message in str(error)
    assert len(str(error)) < 500


def test_name_that_is_too_long_does_not_exist() -> None:
    assert not image_exists("/" + "x" * 5000)
