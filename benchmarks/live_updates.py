"""Counts wrong and failed results while readers query a dataset and its index during 50 updates.

Every update rewrites a few shards and builds the index again. The captions of version N contain N, which shows
whether a result mixes versions. Readers are an open `Index`, the web application, `captionlib.query_sql`, and DuckDB
reading the Parquet files without captionlib. An index searches one version. A dataset is updated shard by shard, so
a result may combine shards of two versions, but each shard must be whole.
"""

import argparse
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa
import uvicorn

from benchmarks.bars import measure_seconds, report, run_benchmark
from benchmarks.server import get_json
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.search.config import IndexConfig
from captionlib.search.index import open_index
from captionlib.search.sql.session import query_sql
from captionlib.serving.startup import AppConfig, load_app
from pipelines.build_index import build_index
from pipelines.run import RunConfig

SHARDS = 8
ROWS = 500
CHANGED_SHARDS = 3


class Reader(threading.Thread):
    """Repeats a check until it is stopped, and counts the results and the problems."""

    def __init__(self, name: str, check: Callable[[], str | None]) -> None:
        super().__init__(name=name, daemon=True)
        self.results = 0
        self.problems: Counter[str] = Counter()
        self.stopped = threading.Event()
        self._check = check

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                problem = self._check()
            except Exception as error:  # every error counts
                problem = f"{type(error).__name__}: {error}"[:200]
            self.results += 1
            if problem is not None:
                self.problems[problem] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=50)
    updates = parser.parse_args().updates
    with tempfile.TemporaryDirectory(prefix="captionlib-live-") as folder:
        _measure(Path(folder), updates)


def _measure(folder: Path, updates: int) -> None:
    _write_version(folder, 0, range(SHARDS))
    _build(folder)
    index = open_index(folder / "index", refresh_seconds=0.05)
    server, port = _serve(folder)
    readers = [
        Reader("index", lambda: _check_versions(index.search_text("common", 2 * ROWS * SHARDS)["caption"].to_pylist())),
        Reader("serve", lambda: _check_serve(port)),
        Reader("sql", lambda: _check_shards(_read_with_query(folder))),
        Reader("duckdb", lambda: _check_shards(_read_with_duckdb(folder))),
    ]
    for reader in readers:
        reader.start()
    seconds = []
    for version in range(1, updates + 1):
        _write_version(folder, version, [(version + shard) % SHARDS for shard in range(CHANGED_SHARDS)])
        seconds.append(measure_seconds(partial(_build, folder)))
    is_newest = _wait_until(lambda: index.search_text(f"build{updates}", 1).num_rows == 1)
    for reader in readers:
        reader.stopped.set()
    for reader in readers:
        reader.join()
    server.should_exit = True
    megabytes = sum(path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file()) / 1e6
    print(f"# build of an update: {sum(seconds) / len(seconds):.2f} s; index after all updates: {megabytes:.1f} MB")
    for reader in readers:
        print(f"# {reader.name}: {reader.results:,} results, {dict(reader.problems.most_common(3))}")
        wrong = sum(reader.problems.values())
        report(f"live-updates-wrong-{reader.name}", wrong, 0, at_least=False)
    if not is_newest:
        sys.exit("the index did not change to the newest version")


def _write_version(folder: Path, version: int, shards: Iterable[int]) -> None:
    """Rewrites shards. Every caption names the version of its shard, and image 0 names the newest build."""
    config = {"input": "synthetic"}
    dataset = create_dataset(folder / "captions", "captions", captions_schema(), config=config, shards=SHARDS + 1)
    # The last shard has one image whose caption names the version of the whole dataset.
    names = {SHARDS: [f"build{version}"]} | {shard: [f"shard{shard}v{version}"] * ROWS for shard in shards}
    for shard, captions in sorted(names.items()):
        rows = [
            {
                "image_id": f"{shard}-{number}",
                "uri": f"{shard}-{number}.jpg",
                "split": "train",
                "caption": f"common {caption}",
                "log_prob": -1.0,
                "tokens": 3,
                "candidates": [{"caption": f"common {caption}", "log_prob": -1.0}],
            }
            for number, caption in enumerate(captions)
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=captions_schema()))
    dataset.finish()


def _build(folder: Path) -> None:
    build_index(folder / "captions", folder / "index", IndexConfig(), run=RunConfig(progress=False))


def _expected_versions(build: int) -> dict[int, int]:
    versions = dict.fromkeys(range(SHARDS), 0)
    for version in range(1, build + 1):
        for shard in range(CHANGED_SHARDS):
            versions[(version + shard) % SHARDS] = version
    return versions


def _check_versions(captions: list[str]) -> str | None:
    """Checks that a result has all rows of one version of the whole dataset."""
    words = Counter(caption.split()[1] for caption in captions)
    builds = [word for word in words if word.startswith("build")]
    if len(builds) != 1:
        return f"{len(builds)} builds in a result"
    versions = _expected_versions(int(builds[0].removeprefix("build")))
    expected = {f"shard{shard}v{version}": ROWS for shard, version in versions.items()} | {builds[0]: 1}
    return None if words == expected else "a result mixes versions"


def _check_shards(counts: dict[str, int]) -> str | None:
    """Checks that a result has every shard once, whole, in any version."""
    shards = Counter(word.split("v")[0] for word in counts if word.startswith("shard"))
    if len(shards) != SHARDS or set(shards.values()) != {1}:
        return "shards are missing or occur twice"
    wrong = [count for word, count in counts.items() if word.startswith("shard") and count != ROWS]
    return "a result has part of a shard" if wrong else None


_COUNT = "SELECT split_part(caption, ' ', 2) AS word, count(*) AS n FROM {} GROUP BY 1"


def _read_with_query(folder: Path) -> dict[str, int]:
    rows = query_sql(folder / "captions", _COUNT.format("captions")).to_pylist()
    return {row["word"]: row["n"] for row in rows}


def _read_with_duckdb(folder: Path) -> dict[str, int]:
    with duckdb.connect() as connection:
        source = f"read_parquet('{folder}/captions/*.parquet')"
        return dict(connection.execute(_COUNT.format(source)).fetchall())


def _serve(folder: Path) -> tuple[uvicorn.Server, int]:
    app = load_app(AppConfig(str(folder / "index"), str(folder / "thumbnails")))
    server_socket = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    threading.Thread(target=server.run, args=([server_socket],), daemon=True).start()
    return server, server_socket.getsockname()[1]


def _check_serve(port: int) -> str | None:
    """Checks the page of one image: its caption and its candidates must be of one version."""
    status, content = get_json(port, "/api/v1/image?id=1-7")
    if status != 200:
        return f"status {status}"
    captions = {content["caption"], *(candidate["caption"] for candidate in content["candidates"])}
    return None if len(captions) == 1 else "a result mixes versions"


def _wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


if __name__ == "__main__":
    run_benchmark(main)
