import errno
import os
import socket
import ssl
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captionlib.data.images.addresses import IMAGE_PROTOCOLS
from captionlib.data.images.fetching import FetchConfig, ImageFetcher, to_fetch_error
from captionlib.errors import ConfigError, FetchError
from captionlib.storage.remote_errors import is_temporary_error

CONTENT = bytes(range(256)) * 40
QUICK = FetchConfig(
    max_image_bytes=20_000,
    attempts=3,
    backoff_seconds=0.01,
    timeout_seconds=20.0,
    protocols=(*IMAGE_PROTOCOLS, "memory"),
)


class Server(ThreadingHTTPServer):
    """A server whose behavior depends on the first part of the path. Counts requests and the endless bytes it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.retry_after: str | None = None
        self.encoding = "identity"
        self.sent = 0
        self.ended = threading.Event()

    def handle_error(self, *_: object) -> None:
        """Ignores clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        self.server.headers = dict(self.headers)
        behavior = self.path.split("/")[1]
        if behavior.isdigit():
            self.answer(int(behavior), b"no")
        elif behavior == "busy":
            self.answer(503 if self.server.requests[self.path] < 3 else 200, CONTENT)
        else:
            getattr(self, f"do_{behavior}")()

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if status >= 400 and self.server.retry_after is not None:
            self.send_header("Retry-After", self.server.retry_after)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_good(self) -> None:
        self.answer(200, CONTENT)

    def do_ranges(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = CONTENT[int(first) : int(last) + 1]
        if part:
            self.answer(206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(CONTENT)}")
        else:
            self.answer(416, b"")

    def do_encoded(self) -> None:
        self.answer(200, CONTENT, Content_Encoding=self.server.encoding)

    def do_policy(self) -> None:
        self.answer(200, CONTENT, Content_Security_Policy="x" * int(self.path.rsplit("/", 1)[1]))

    def do_circle(self) -> None:
        self.answer(302, b"", Location=self.path)

    def do_moved(self) -> None:
        self.answer(302, b"", Location="/good/image.jpg")

    def do_cut(self) -> None:
        """Cuts the first connection in the middle of the body."""
        if self.server.requests[self.path] > 1:
            self.answer(200, CONTENT)
        else:
            self.answer(200, CONTENT[:1000], length=len(CONTENT))
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_announced(self) -> None:
        """Announces a length that is too large."""
        self.answer(200, b"", length=10**12)
        self.endless()

    def do_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.endless()

    def endless(self) -> None:
        self.close_connection = True
        try:
            while self.server.sent < 10**9:
                self.wfile.write(bytes(2**16))
                self.server.sent += 2**16
        except OSError:
            pass
        self.server.ended.set()

    def do_trickle(self) -> None:
        """Sends a byte now and then, forever."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        try:
            while not self.server.ended.wait(0.02):
                self.wfile.write(b"x")
        except OSError:
            pass

    def do_bucket(self) -> None:
        """Imitates a part of S3."""
        key = self.path.split("?")[0].split("/")[2]
        if key == "none":
            self.answer(404, error("NoSuchKey"), Content_Type="application/xml")
        elif key == "secret":
            self.answer(403, error("AccessDenied"), Content_Type="application/xml")
        elif key == "empty":
            self.answer(416, error("InvalidRange"), Content_Type="application/xml")
        elif key == "throttled" and self.server.requests[self.path] < 2:
            self.answer(503, error("ServiceUnavailable"), Content_Type="application/xml")
        else:
            self.do_ranges()


def error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def fetcher() -> Iterator[ImageFetcher]:
    with ImageFetcher(QUICK) as fetcher:
        yield fetcher


def reason(fetcher: ImageFetcher, uri: str) -> str:
    with pytest.raises(FetchError) as caught:
        fetcher.fetch(uri)
    assert str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "two words.jpg", "#1.jpg", "100%20.jpg", "50%.jpg", "naïve 日本.jpg", "a&b=c?d.jpg", "[x]*.jpg", "a::b"],
)
def test_fetch_reads_local_files_of_any_name(fetcher: ImageFetcher, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENT)
    assert fetcher.fetch(str(tmp_path / name)) == CONTENT
    assert fetcher.fetch((tmp_path / name).as_uri()) == CONTENT


def test_fetch_reads_relative_paths(fetcher: ImageFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c#d.jpg").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    assert fetcher.fetch("c#d.jpg") == CONTENT
    assert fetcher.fetch("./c#d.jpg") == CONTENT


def test_missing_files_fail(fetcher: ImageFetcher, tmp_path: Path) -> None:
    assert reason(fetcher, str(tmp_path / "none.jpg")) == "NotFound"
    assert reason(fetcher, f"file://{tmp_path}/none.jpg") == "NotFound"
    assert reason(fetcher, f"memory://{uuid4()}") == "NotFound"
    assert reason(fetcher, str(tmp_path)) == "NotAFile"
    assert reason(fetcher, "nonsense://x/y.jpg") == "BadAddress"
    assert reason(fetcher, "a\0b") == "BadAddress"
    assert reason(fetcher, "") == "NotFound"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_fail(fetcher: ImageFetcher, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").touch(mode=0)
    assert reason(fetcher, str(tmp_path / "secret.jpg")) == "Forbidden"


def test_named_pipes_and_devices_are_rejected(fetcher: ImageFetcher, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(fetcher, str(tmp_path / "pipe.jpg")) == "NotAFile"
    assert reason(fetcher, "/dev/zero") == "NotAFile"


def test_size_limit_applies_to_all_file_systems(fetcher: ImageFetcher, tmp_path: Path, server: Server) -> None:
    name = uuid4().hex
    for address in (str(tmp_path / "a"), f"memory://{name}"):
        fsspec.filesystem("memory").pipe(f"/{name}", bytes(20_000))
        (tmp_path / "a").write_bytes(bytes(20_000))
        assert len(fetcher.fetch(address)) == 20_000
        fsspec.filesystem("memory").pipe(f"/{name}", bytes(20_001))
        (tmp_path / "a").write_bytes(bytes(20_001))
        assert reason(fetcher, address) == "TooLarge"
    assert reason(fetcher, f"{server.url}/announced/a.jpg") == "TooLarge"


def test_endless_responses_are_not_read_to_the_end(fetcher: ImageFetcher, server: Server) -> None:
    assert reason(fetcher, f"{server.url}/endless/a.jpg") == "TooLarge"
    assert server.ended.wait(60)
    assert server.sent < 50_000_000  # socket buffers, not the whole GB
    assert server.requests["/endless/a.jpg"] == 1


def test_configured_protocols_are_read(fetcher: ImageFetcher) -> None:
    fsspec.filesystem("memory").pipe("/x y#z.jpg", CONTENT)
    assert fetcher.fetch("memory://x y#z.jpg") == CONTENT
    with ImageFetcher() as strict:
        assert reason(strict, "memory://x y#z.jpg") == "BadAddress"


def test_fetch_reads_web_addresses(fetcher: ImageFetcher, server: Server) -> None:
    assert fetcher.fetch(f"{server.url}/good/a b%20c.jpg?x=1#part") == CONTENT
    assert list(server.requests) == ["/good/a%20b%20c.jpg?x=1"]
    assert server.headers["User-Agent"].startswith("captionlib/")
    assert fetcher.fetch(f"{server.url}/moved/a.jpg") == CONTENT


def test_fsspec_options_apply(fetcher: ImageFetcher, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"headers": {"User-Agent": "me", "X-Key": "1"}}})
    assert fetcher.fetch(f"{server.url}/good/a.jpg") == CONTENT
    assert server.headers["User-Agent"] == "me"
    assert server.headers["X-Key"] == "1"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, "BadRequest"),
        (401, "Forbidden"),
        (403, "Forbidden"),
        (404, "NotFound"),
        (410, "NotFound"),
        (416, "BadRange"),
        (418, "BadRequest"),
        (501, "ServerError"),
        (999, "ServerError"),
    ],
)
def test_permanent_errors_are_not_retried(fetcher: ImageFetcher, server: Server, status: int, expected: str) -> None:
    assert reason(fetcher, f"{server.url}/{status}/a.jpg") == expected
    assert server.requests.total() == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [(408, "Timeout"), (429, "TooManyRequests"), *((status, "ServerError") for status in (500, 502, 503, 504))],
)
def test_temporary_errors_are_retried_up_to_the_limit(
    fetcher: ImageFetcher, server: Server, status: int, expected: str
) -> None:
    assert reason(fetcher, f"{server.url}/{status}/a.jpg") == expected
    assert server.requests.total() == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honored(
    fetcher: ImageFetcher, server: Server, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    server.retry_after = "40" if form == "seconds" else formatdate(time.time() + 40, usegmt=True)
    waits: list[float] = []
    monkeypatch.setattr(fetcher._retrying, "sleep", waits.append)
    assert fetcher.fetch(f"{server.url}/busy/a.jpg") == CONTENT
    assert [38 < wait < 41 for wait in waits] == [True, True]


@pytest.mark.parametrize("value", ["61", formatdate(2**31, usegmt=True)])
def test_retry_after_beyond_the_limit_fails_at_once(fetcher: ImageFetcher, server: Server, value: str) -> None:
    server.retry_after = value
    with pytest.raises(FetchError, match=r"with a request to retry after \d+ seconds; retry later"):
        fetcher.fetch(f"{server.url}/429/a.jpg")
    assert server.requests.total() == 1


@pytest.mark.parametrize("value", ["soon", "-5", "", formatdate(0)])
def test_meaningless_retry_after_is_ignored(fetcher: ImageFetcher, server: Server, value: str) -> None:
    server.retry_after = value
    assert fetcher.fetch(f"{server.url}/busy/a.jpg") == CONTENT


def test_compression_is_not_requested(fetcher: ImageFetcher, server: Server, parquet: Path) -> None:
    fetcher.fetch(f"{server.url}/good/a.jpg")
    assert server.headers["Accept-Encoding"] == "identity"
    server.headers = {}
    reason(fetcher, f"{server.url}/good/a.parquet#row=0&column=x")
    assert server.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("encoding", ["br", "zstd"])
def test_response_in_an_unsupported_encoding_is_a_bad_response(
    fetcher: ImageFetcher, server: Server, encoding: str
) -> None:
    server.encoding = encoding
    assert reason(fetcher, f"{server.url}/encoded/a.jpg") == "BadResponse"
    assert server.requests.total() == 1


def test_long_headers_are_accepted_up_to_a_limit(fetcher: ImageFetcher, server: Server) -> None:
    assert fetcher.fetch(f"{server.url}/policy/60000") == CONTENT
    assert reason(fetcher, f"{server.url}/policy/70000") == "BadResponse"


def test_endless_redirects_have_their_own_reason(fetcher: ImageFetcher, server: Server) -> None:
    assert reason(fetcher, f"{server.url}/circle/a.jpg") == "TooManyRedirects"


def test_fetch_succeeds_when_the_server_recovers(fetcher: ImageFetcher, server: Server) -> None:
    assert fetcher.fetch(f"{server.url}/busy/a.jpg") == CONTENT
    assert server.requests.total() == 3


def test_interrupted_connection_is_retried(fetcher: ImageFetcher, server: Server) -> None:
    assert fetcher.fetch(f"{server.url}/cut/a.jpg") == CONTENT
    assert server.requests.total() == 2


def test_missing_server_is_a_connection_error(fetcher: ImageFetcher) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert reason(fetcher, f"http://127.0.0.1:{port}/a.jpg") == "ConnectionFailed"


@pytest.mark.timeout(60)
def test_slow_response_times_out(server: Server) -> None:
    config = FetchConfig(timeout_seconds=0.3, attempts=2, backoff_seconds=0.01)
    with ImageFetcher(config) as fetcher:
        assert reason(fetcher, f"{server.url}/trickle/a.jpg") == "Timeout"
    assert server.requests.total() == 2


@pytest.mark.timeout(60)
def test_close_cancels_fetches(server: Server) -> None:
    fetcher = ImageFetcher(FetchConfig(timeout_seconds=1000.0, backoff_seconds=1000.0))
    with ThreadPoolExecutor(2) as threads:
        fetching = [threads.submit(reason, fetcher, f"{server.url}/{name}/a.jpg") for name in ("trickle", "503")]
        while server.requests.total() < 2:
            pass
        fetcher.close()
        assert fetching[0].result() == "Cancelled"
        assert fetching[1].result() in {"Cancelled", "ServerError"}
    assert reason(fetcher, f"{server.url}/good/a.jpg") == "Cancelled"


@pytest.mark.parametrize("behavior", ["ranges", "good"])
def test_ranges_are_read_with_and_without_server_support(fetcher: ImageFetcher, server: Server, behavior: str) -> None:
    assert fetcher.fetch(f"{server.url}/{behavior}/a.tar#bytes=1000-1010") == CONTENT[1000:1010]
    assert fetcher.fetch(f"{server.url}/{behavior}/a.tar#bytes=0-10240") == CONTENT
    assert reason(fetcher, f"{server.url}/{behavior}/a.tar#bytes=10000-10300") == "ShortRead"


def test_tar_members_are_read(fetcher: ImageFetcher, tmp_path: Path) -> None:
    path = tmp_path / "some images #1.tar"
    images = {f"{number}.jpg": bytes([number]) * (700 + number) for number in range(3)}
    with tarfile.open(path, "w") as archive:
        for name, content in images.items():
            (tmp_path / name).write_bytes(content)
            archive.add(tmp_path / name, name)
    with tarfile.open(path) as archive:
        spans = {member.name: (member.offset_data, member.offset_data + member.size) for member in archive}
    fsspec.filesystem("memory").pipe("/images.tar", path.read_bytes())
    for name, (start, end) in spans.items():
        for address in (path, f"file://{path}", "memory://images.tar"):
            assert fetcher.fetch(f"{address}#bytes={start}-{end}") == images[name]


def test_invalid_ranges_fail(fetcher: ImageFetcher, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    assert reason(fetcher, f"{path}#bytes=10-10") == "BadRange"
    assert reason(fetcher, f"{path}#bytes=10-9") == "BadRange"
    assert reason(fetcher, f"{path}#bytes=10239-10241") == "ShortRead"
    assert reason(fetcher, f"{path}#bytes=0-20001") == "TooLarge"
    assert reason(fetcher, f"{path}#bytes=0-") == "NotFound"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A file of ten rows in row groups of four."""
    content = [None if row == 7 else bytes([row]) * (10 + row) for row in range(10)]
    rows = pa.table(
        {
            "name": [f"{row}.jpg" for row in range(10)],
            "plain": pa.array(content, pa.large_binary()),
            "image": pa.array(
                [{"bytes": one, "path": "p"} for one in content],
                pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            ),
        }
    )
    path = tmp_path / "a #1.parquet"
    pq.write_table(rows, path, row_group_size=4)
    return path


@pytest.mark.parametrize("column", ["plain", "image.bytes"])
def test_parquet_cells_are_read(fetcher: ImageFetcher, parquet: Path, column: str) -> None:
    fsspec.filesystem("memory").pipe("/a.parquet", parquet.read_bytes())
    for row in (9, 0, 3, 4, 8, 5):
        for address in (parquet, "memory://a.parquet"):
            assert fetcher.fetch(f"{address}#row={row}&column={column}") == bytes([row]) * (10 + row)


def test_invalid_parquet_cells_fail(fetcher: ImageFetcher, parquet: Path, tmp_path: Path) -> None:
    assert reason(fetcher, f"{parquet}#row=10&column=plain") == "NoSuchRow"
    assert reason(fetcher, f"{parquet}#row=7&column=plain") == "NoBytes"
    assert reason(fetcher, f"{parquet}#row=7&column=image.bytes") == "NoBytes"
    assert reason(fetcher, f"{parquet}#row=0&column=name") == "NoBytes"
    assert reason(fetcher, f"{parquet}#row=0&column=other") == "NoSuchColumn"
    assert reason(fetcher, f"{tmp_path}/none.parquet#row=0&column=plain") == "NotFound"
    (tmp_path / "damaged.parquet").write_bytes(parquet.read_bytes()[:-100])
    assert reason(fetcher, f"{tmp_path}/damaged.parquet#row=0&column=plain") == "DamagedFile"


def test_large_cells_and_column_chunks_fail(parquet: Path) -> None:
    with ImageFetcher(FetchConfig(max_image_bytes=12)) as fetcher:
        assert fetcher.fetch(f"{parquet}#row=2&column=plain") == bytes([2]) * 12
        assert reason(fetcher, f"{parquet}#row=3&column=plain") == "TooLarge"
    with ImageFetcher(FetchConfig(max_column_chunk_bytes=60)) as fetcher:
        assert reason(fetcher, f"{parquet}#row=0&column=plain") == "TooLarge"


def test_each_row_group_is_read_once(fetcher: ImageFetcher, parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    memory = fsspec.filesystem("memory")
    memory.pipe("/counted.parquet", parquet.read_bytes())
    open_file = type(memory)._open
    monkeypatch.setattr(
        type(memory),
        "_open",
        lambda self, path, *rest, **more: opened.append(path) or open_file(self, path, *rest, **more),
    )
    rows = [row for row in range(10) if row != 7]
    with ThreadPoolExecutor(8) as threads:
        contents = list(
            threads.map(lambda row: fetcher.fetch(f"memory://counted.parquet#row={row}&column=plain"), rows)
        )
    assert contents == [bytes([row]) * (10 + row) for row in rows]
    assert len(opened) == 4  # the footer and three row groups


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    pytest.importorskip("s3fs")
    options = {"anon": True, "endpoint_url": server.url, "client_kwargs": {"region_name": "us-east-1"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    return server


def test_s3_objects_are_read(s3: Server) -> None:
    with ImageFetcher(QUICK) as fetcher:
        assert fetcher.fetch("s3://bucket/a b.jpg") == CONTENT
        assert fetcher.fetch("s3://bucket/a.tar#bytes=5-9") == CONTENT[5:9]
        assert fetcher.fetch("s3://bucket/empty") == b""
        assert reason(fetcher, "s3://bucket/none") == "NotFound"
        assert reason(fetcher, "s3://bucket/secret") == "Forbidden"
    with ImageFetcher(FetchConfig(max_image_bytes=100)) as fetcher:
        assert reason(fetcher, "s3://bucket/a.jpg") == "TooLarge"


def test_throttled_s3_requests_are_retried(s3: Server) -> None:
    with ImageFetcher(QUICK) as fetcher:
        assert fetcher.fetch("s3://bucket/throttled") == CONTENT


def caused(by: Exception, error: Exception) -> Exception:
    error.__cause__ = by
    return error


class ClientError(Exception):
    """Like botocore's error, with the response."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class ReadTimeoutError(Exception):
    """Like botocore's error, which is not a TimeoutError."""


class HttpError(Exception):
    """Like gcsfs's error."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


@pytest.mark.parametrize(
    ("error", "temporary", "expected"),
    [
        (OSError(errno.EBUSY, "slow down"), True, "Unreadable"),
        (OSError(errno.EIO, "input/output error"), True, "Unreadable"),
        (OSError(errno.ENAMETOOLONG, "name"), False, "BadAddress"),
        (ssl.SSLCertVerificationError("expired"), False, "BadCertificate"),
        (caused(ClientError(503), OSError(errno.EBUSY, "slow down")), True, "ServerError"),
        (caused(ClientError(404), FileNotFoundError("key")), False, "NotFound"),
        (caused(ClientError(400), OSError(errno.EIO, "expired")), False, "BadRequest"),
        (ReadTimeoutError("read"), True, "Timeout"),
        (HttpError(429), True, "TooManyRequests"),
        (HttpError(404), False, "NotFound"),
        (ConnectionResetError("peer"), True, "ConnectionFailed"),
        (TimeoutError(), True, "Timeout"),
        (ImportError("install s3fs"), False, "Unreadable"),
    ],
    ids=repr,
)
def test_errors_are_classified(error: Exception, temporary: bool, expected: str) -> None:
    assert is_temporary_error(error) == temporary
    assert to_fetch_error(error).reason == expected
    assert str(to_fetch_error(error))


@pytest.mark.parametrize(
    "wrong", ["max_image_bytes", "attempts", "max_column_chunk_bytes", "timeout_seconds", "backoff_seconds"]
)
def test_invalid_limits_are_rejected(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        FetchConfig(**{wrong: -1})
