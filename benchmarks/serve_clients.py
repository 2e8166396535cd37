"""Measures search pages per second for 50 concurrent clients relative to one, on 1,000,000 captions or `--rows N`."""

import argparse
import asyncio
import os
import time
from pathlib import Path
from statistics import median
from urllib.parse import urlencode

from benchmarks.bars import report, run_benchmark
from benchmarks.search_data import SearchData, prepare_data
from benchmarks.server import serve

CLIENTS = 50
SECONDS = 8.0
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data, _ = prepare_data(options.rows)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server
    with serve(data.index, Path(".bench") / "thumbnails", "--workers", str(options.workers)) as (port, _):
        asyncio.run(_measure(data, port))


async def _measure(data: SearchData, port: int) -> None:
    paths = [f"/?{urlencode({'q': query})}" for query in data.sample_queries(500, 2, 1)]
    await _run(port, paths, CLIENTS, 2.0)  # warm-up
    single: list[float] = []
    many: list[float] = []
    errors = 0
    for _ in range(ROUNDS):
        for clients, rates in ((1, single), (CLIENTS, many)):
            rate, failed = await _run(port, paths, clients, SECONDS)
            rates.append(rate)
            errors += failed
    print(f"# pages per second: one client {median(single):.0f}, {CLIENTS} {median(many):.0f}")
    report("serve-errors", errors, 0, at_least=False)
    report("serve-clients-to-one", median(many) / median(single), 1.8)


async def _run(port: int, paths: list[str], clients: int, seconds: float) -> tuple[float, int]:
    """Returns pages per second and the number of failed requests."""
    began = time.monotonic()
    done = await asyncio.gather(*(_client(port, paths[client:], began + seconds) for client in range(clients)))
    return sum(pages for pages, _ in done) / (time.monotonic() - began), sum(errors for _, errors in done)


async def _client(port: int, paths: list[str], until: float) -> tuple[int, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    pages = errors = 0
    while time.monotonic() < until:
        path = paths[(pages + errors) % len(paths)]
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError, IndexError):
            errors += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        if head.startswith(b"HTTP/1.1 200 ") and b'class="summary"' in body:
            pages += 1
        else:
            errors += 1
    writer.close()
    return pages, errors


if __name__ == "__main__":
    run_benchmark(main)
