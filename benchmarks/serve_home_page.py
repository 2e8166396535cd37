"""Measures the server time of all requests of the first home page of a new process, on 1,000,000 captions."""

import argparse
import re
import statistics
from html import unescape
from http.client import HTTPConnection

from benchmarks.bars import report, run_benchmark
from benchmarks.page_data import prepare_page_data
from benchmarks.server import serve

ROUNDS = 3
MAX_MILLISECONDS = 150.0
MAX_KILOBYTES = 150.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    data = prepare_page_data(parser.parse_args().rows)
    milliseconds, kilobytes, failures = [], 0.0, 0
    for _ in range(ROUNDS):
        with serve(data.index, data.thumbnails) as (port, _):
            kilobytes, failed = _visit(port)
            milliseconds.append(1000 * _read_seconds(port))
            failures += failed
    print(f"# milliseconds of each process: {', '.join(f'{each:.0f}' for each in milliseconds)}")
    report("serve-home-page-milliseconds", statistics.median(milliseconds), MAX_MILLISECONDS, at_least=False)
    report("serve-home-page-kilobytes-without-images", kilobytes, MAX_KILOBYTES, at_least=False)
    report("serve-home-page-failures", failures, 0, at_least=False)


def _visit(port: int) -> tuple[float, int]:
    """Requests the page, its scripts, styles and images. Returns the kilobytes without images, and the failures."""
    connection = HTTPConnection("127.0.0.1", port)
    html = _get(connection, "/", "text/html") or b""
    paths = dict.fromkeys(re.findall(r'(?:src|href)="(/static/[^"]+|/thumbnail/[^"]+)"', html.decode()))
    contents = {path: _get(connection, unescape(path), "*/*") for path in paths}
    size = sum(len(content or b"") for path, content in contents.items() if path.startswith("/static/"))
    return (len(html) + size) / 1000, sum(content is None for content in [html or None, *contents.values()])


def _get(connection: HTTPConnection, path: str, accept: str) -> bytes | None:
    connection.request("GET", path, headers={"Accept": accept})
    response = connection.getresponse()
    content = response.read()
    return content if response.status == 200 else None


def _read_seconds(port: int) -> float:
    """Returns the server time of all requests except for those of the benchmark itself."""
    metrics = (_get(HTTPConnection("127.0.0.1", port), "/metrics", "*/*") or b"").decode()
    sums = re.findall(r'captionlib_request_seconds_sum\{endpoint="([^"]+)"\} (\S+)', metrics)
    return sum(float(seconds) for endpoint, seconds in sums if endpoint not in ("/health", "/metrics"))


if __name__ == "__main__":
    run_benchmark(main)
