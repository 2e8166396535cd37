"""Measures errors, latency and memory of `captionlib serve` under 60 clients, for 5 minutes or `--minutes N`.

Each client has its own address in 127.0.0.0/8. The clients request all pages and the API without a break, load the
thumbnails of each page and upload images. A third of the images are on slow and hanging hosts. Further connections send
incomplete headers and incomplete bodies. Meanwhile the captions change ten times, and the index is built again. Other
processes than that of the clients do this and observe the server, because the clients' process is itself busy.
"""

import argparse
import asyncio
import io
import multiprocessing
import random
import re
import shutil
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.bars import report, run_benchmark
from benchmarks.decoding_speed import build_captioner
from benchmarks.search_data import WORDS, describe_captions
from benchmarks.server import get_json, serve
from benchmarks.synthetic_datasets import write_dataset
from benchmarks.synthetic_images import write_images
from captionlib.data.shards.schemas import captions_schema, embeddings_schema
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.models.checkpoints.checkpoint import save_captioner, save_ranker
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.rankers.ranker import RankerConfig, RankerNetwork
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig

CLIENTS, SLOW_CONNECTIONS, ROWS = 60, 100, 20_000
HOSTS = {"fast": "127.0.2.1", "slow": "127.0.2.2", "hanging": "127.0.2.3"}  # of images
REQUEST_TIMEOUT_SECONDS = 120.0
WARM_UP_SECONDS = 120.0
INDEX_UPDATES = 10
FOLDER = Path(".bench") / "serve-soak"


@dataclass
class Results:
    """What the clients observed.

    Attributes:
        statuses: number of responses by path and status; status 0 means that there was no valid response.
        uploads: number of captioned images by client.
        failures: number of requests without a valid response by method, path and exception.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    uploads: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


class Observation(NamedTuple):
    """The state of the server at one moment.

    Attributes:
        seconds: time since the start.
        megabytes: resident memory of the server without its decoders.
        health_status: status of the response of `/health`; 0 if there was no valid response.
        health_seconds: latency of `/health`.
    """

    seconds: float
    megabytes: float
    health_status: int
    health_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    seconds = 60 * options.minutes
    if seconds < 1.5 * WARM_UP_SECONDS:
        parser.error(f"--minutes: expected {1.5 * WARM_UP_SECONDS / 60:g} or more, got {options.minutes:g}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    results = Results()
    context = multiprocessing.get_context("spawn")
    with _serve_images() as image_port, ProcessPoolExecutor(2, context) as executor:
        _write_index(image_port)
        models = ["--ranker", str(FOLDER / "ranker"), "--captioner", str(FOLDER / "captioner")]
        with serve(FOLDER / "index", FOLDER / "thumbnails", *models, "--allow-private-hosts") as (port, process):
            observations = executor.submit(_observe, port, process.pid, seconds)
            updates = executor.submit(_update_index, image_port, port, seconds)
            asyncio.run(_run_clients(port, time.monotonic() + seconds, results))
            _report(results, observations.result(), updates.result())


def _report(results: Results, observations: list[Observation], index_updates: int) -> None:
    results.statuses.update(("/health", observation.health_status) for observation in observations)
    for (path, status), count in sorted(results.statuses.items()):
        print(f"# {path} {status}: {count}")
    for failure, count in results.failures.most_common():
        print(f"# {failure}: {count}")
    uploads = [results.uploads[client] for client in range(CLIENTS)]
    print(f"# index updates that reached the server: {index_updates} of {INDEX_UPDATES}")
    print(f"# captioned images per client: {min(uploads)} to {max(uploads)}, median {statistics.median(uploads)}")
    print("# memory: " + ", ".join(f"{row.megabytes:.0f} MB" for row in observations[:: len(observations) // 10]))
    slowest = sorted(observations, key=lambda row: row.health_seconds)[-5:]
    print("# slowest /health: " + ", ".join(f"{row.health_seconds:.3f} s at {row.seconds:.0f} s" for row in slowest))
    errors = sum(count for (_, status), count in results.statuses.items() if status == 0 or status in range(500, 503))
    early = max(row.megabytes for row in observations if row.seconds <= WARM_UP_SECONDS)
    late = max(row.megabytes for row in observations if row.seconds > WARM_UP_SECONDS)
    report("serve-soak-errors", errors, 0, at_least=False)
    report("serve-soak-health-seconds", slowest[-1].health_seconds, 0.5, at_least=False)
    report("serve-soak-captioned-images-of-unluckiest-client", min(uploads), 1)
    report("serve-soak-memory-ratio", late / early, 1.05, at_least=False)


def _write_index(image_port: int) -> None:
    encoder = load_encoder(EncoderConfig("resnet18", "flatten", "random:0"), "cpu").description
    vocabulary = Vocabulary.from_captions([" ".join(WORDS)], 1)
    (size,) = encoder["shape"]
    save_captioner(
        FOLDER / "captioner", build_captioner(size, len(vocabulary)), vocabulary, encoder, provenance={}, training={}
    )
    ranker = RankerNetwork(RankerConfig(), size, len(vocabulary)).eval()
    fingerprint = save_ranker(FOLDER / "ranker", ranker, vocabulary, encoder, provenance={}, training={})
    write_images(FOLDER / "images", 200, 500)
    _write_captions(image_port, version=0)
    generator = np.random.default_rng(0)
    schema = embeddings_schema(RankerConfig().joint_embedding_size)
    config = {"source": "synthetic", "ranker": fingerprint}
    vectors = generator.normal(size=(ROWS, RankerConfig().joint_embedding_size))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = [
        {"image_id": str(number), "uri": _get_uri(number, image_port), "embedding": vector}
        for number, vector in enumerate(vectors.astype(np.float16))
    ]
    rows = pa.RecordBatch.from_pylist(values, schema=schema)
    write_dataset(FOLDER / "embeddings", "embeddings", schema, 1, lambda shard: rows, config)
    _build_index()


def _write_captions(image_port: int, version: int) -> None:
    generator = np.random.default_rng(version)
    columns = {
        "image_id": [str(number) for number in range(ROWS)],
        "uri": [_get_uri(number, image_port) for number in range(ROWS)],
        "split": ["train"] * ROWS,
        **describe_captions([" ".join(words) for words in generator.choice(WORDS, (ROWS, 8))], np.full(ROWS, -9.0)),
    }
    rows, config = pa.RecordBatch.from_pydict(columns), {"source": "synthetic"}
    write_dataset(FOLDER / "captions", "captions", captions_schema(), 1, lambda shard: rows, config)


def _get_uri(number: int, image_port: int) -> str:
    source = ["local", "local", "fast", "fast", "slow", "hanging"][number % 6]
    if source == "local":
        return str(sorted((FOLDER / "images").iterdir())[number % 200])
    return f"http://{HOSTS[source]}:{image_port}/{number}.jpg"


def _build_index() -> None:
    build = plan_build(FOLDER / "captions", FOLDER / "embeddings", FOLDER / "index", IndexConfig())
    build.train()
    for shard in build.added:
        build.add_shard(shard)
    build.finish()


def _update_index(image_port: int, port: int, seconds: float) -> int:
    """Writes new captions and builds the index again, `INDEX_UPDATES` times, evenly spread over the run.

    Returns the number of new versions of the index that `/health` reported.
    """
    versions = {get_json(port, "/health")[1]["index"]}
    for version in range(1, INDEX_UPDATES + 1):
        time.sleep(seconds / (2 * INDEX_UPDATES + 4))
        _write_captions(image_port, version)
        _build_index()
        time.sleep(seconds / (2 * INDEX_UPDATES + 4))  # the server looks for a new version every few seconds
        versions.add(get_json(port, "/health")[1]["index"])
    return len(versions) - 1


def _observe(port: int, server: int, seconds: float) -> list[Observation]:
    """Reads the memory of the server process and requests `/health`, twice a second."""
    observations = []
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        process_status = Path(f"/proc/{server}/status").read_text()
        (kilobytes,) = re.findall(r"VmRSS:\s+(\d+) kB", process_status)
        status = 0
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as response:
                status = response.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError as error:
            print(f"# GET /health {error!r}", flush=True)
        observations.append(Observation(now - began, int(kilobytes) / 1000, status, time.monotonic() - now))
        time.sleep(0.5)
    return observations


async def _run_clients(port: int, until: float, results: Results) -> None:
    files = [path.read_bytes() for path in sorted((FOLDER / "images").iterdir())[:10]]
    generator = np.random.default_rng(1)
    for width, height in [(3000, 2000), (1200, 300), (640, 480)]:
        pixels = generator.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    clients = [_run_client(client, port, until, files, results) for client in range(CLIENTS)]
    slow = [_send_slowly(port, until, partial) for partial in (_HALF_HEADERS, _HALF_BODY) * (SLOW_CONNECTIONS // 2)]
    await asyncio.gather(*clients, *slow)


async def _run_client(client: int, port: int, until: float, files: list[bytes], results: Results) -> None:
    chooser = random.Random(client)
    connector = aiohttp.TCPConnector(local_addr=(f"127.0.1.{client + 1}", 0), limit=6)  # as many as a browser opens
    timeout = aiohttp.ClientTimeout(REQUEST_TIMEOUT_SECONDS)
    base = f"http://127.0.0.1:{port}"

    async with aiohttp.ClientSession(base, connector=connector, timeout=timeout) as session:

        async def send(method: str, url: str, data: aiohttp.FormData | None = None) -> tuple[int, str]:
            status, text = 0, ""
            try:
                async with session.request(method, url, data=data) as response:
                    content = await response.read()
                    status = response.status
                    text = content.decode(errors="replace") if response.content_type == "text/html" else ""
                    if status == 503 and "Retry-After" not in response.headers:
                        status = 500
            except (aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
                results.failures[f"{method} {url.partition('?')[0]} {error!r}"] += 1
            results.statuses[url.partition("?")[0], status] += 1
            return status, text

        while time.monotonic() < until:
            method, url, form = _choose_request(chooser, files)
            status, page = await send(method, url, form)
            results.uploads[client] += url in _UPLOAD_URLS and status == 200
            thumbnails = re.findall(r'src="(/thumbnail/[^"]*)"', page)
            await asyncio.gather(*(send("GET", url) for url in thumbnails))
            await asyncio.sleep(chooser.random())


def _choose_request(chooser: random.Random, files: list[bytes]) -> tuple[str, str, aiohttp.FormData | None]:
    """Returns the method, the URL and the form of a random request; half of them are text searches."""
    kind = chooser.choices(["search", "upload", "image", "api", "export"], [50, 25, 10, 10, 5])[0]
    word, image_id = chooser.choice(WORDS), chooser.randrange(ROWS)
    if kind == "search":
        return "GET", f"/?q={word}", None
    if kind == "image":
        return "GET", f"/image?id={image_id}", None
    if kind == "api":
        urls = ["/metrics", "/docs", "/openapi.json", f"/api/v1/image?id={image_id}"]
        urls += [f"/api/v1/search?q={word}&mode={mode}&limit=100" for mode in ("text", "sentence", "hybrid")]
        return "GET", chooser.choice(urls), None
    form = aiohttp.FormData()
    if kind == "export":
        form.add_field("format", chooser.choice(["csv", "parquet"]))
        for number in chooser.sample(range(ROWS), 100):
            form.add_field("id", str(number))
        return "POST", "/export", form
    url = chooser.choice(_UPLOAD_URLS)
    form.add_field("images" if url == "/api/v1/caption" else "image", chooser.choice(files), filename="image.jpg")
    return "POST", url, form


_UPLOAD_URLS = ["/image-search", "/api/v1/image-search", "/api/v1/caption"]
_HALF_HEADERS = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
_HALF_BODY = (
    b"POST /api/v1/image-search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
)


async def _send_slowly(port: int, until: float, partial: bytes) -> None:
    """Opens a connection, sends part of a request and then one byte per second, again and again."""
    while time.monotonic() < until:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(partial)
            while time.monotonic() < until and not reader.at_eof():
                writer.write(b"x")
                with suppress(TimeoutError, asyncio.TimeoutError):
                    if not await asyncio.wait_for(reader.read(1000), 1):
                        break
            writer.close()
        await asyncio.sleep(0.1)


@contextmanager
def _serve_images() -> Iterator[int]:
    """Serves an image on hosts of different speed, in a thread."""
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 90).convert("RGB").save(buffer, "JPEG")
    content = buffer.getvalue()
    response = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(content), content)
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            host = writer.get_extra_info("sockname")[0]
            if host == HOSTS["hanging"]:
                await reader.read()  # until the client gives up
            else:
                await asyncio.sleep(random.uniform(0.5, 3) if host == HOSTS["slow"] else 0)
                writer.write(response)
                await writer.drain()
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(answer, "0.0.0.0", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port: int = server.sockets[0].getsockname()[1]
        yield port
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


if __name__ == "__main__":
    run_benchmark(main)
