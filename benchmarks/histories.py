"""Compares collections after random histories with fresh ones: `python -m benchmarks.histories --histories 200`.

A history adds, changes, removes and re-captions images of a table, kills the update at a random storage call and
resumes it, or runs two updates at the same time. In the end, features, captions, failures and index must equal those of
a fresh build of the final table, by image id. In undisturbed updates, exactly the new and changed images may be encoded
and captioned.

The stages are those of captionlib (`prepare`, `ShardJob`, `IndexBuild`) without Beam. Their models are stand-ins that
compute features and captions from the path and the version of an image. Every tenth image cannot be read.
"""

import argparse
import csv
import random
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from benchmarks.bars import report, run_benchmark
from benchmarks.simulated_kills import Killed, kill_after
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema, features_schema
from captionlib.data.shards.stages import ProcessRows, ReportFailure, ShardJob
from captionlib.data.sources.rows import SourceOptions
from captionlib.errors import CaptionlibError, DecodeError
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index import open_index
from captionlib.storage.folders import Folder
from captionlib.storage.lock import LOCK_FILE

NAMES = [f"image{number:02d}" for number in range(40)]
SIZE = 4
OPTIONS = SourceOptions(version_column="version", uri_column="uri")
CONFIG = PrepareConfig("table", OPTIONS, shard_size=5, check_images=False, allow_removal=True)

Table = dict[str, tuple[int, str]]  # version and reference of each image


class StandIn:
    """A stage whose model is a function of the input row. Counts the images that it processes."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.processed: list[str] = []

    @property
    def columns(self) -> list[str]:
        return [*MANIFEST_SCHEMA.names, *(["features"] if self.kind == "captions" else [])]

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        yield self._process

    def _process(self, batches: Iterator[pa.RecordBatch], fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
        for batch in batches:
            rows = []
            for row in batch.to_pylist():
                self.processed.append(row["image_id"])
                if self.kind == "features" and row["image_id"].endswith("7"):
                    fail(row, DecodeError("Truncated", "ends early"))
                else:
                    rows.append(row)
            yield (self._compute(rows),)

    def _compute(self, rows: list[dict[str, Any]]) -> pa.RecordBatch:
        if self.kind == "features":
            vectors = np.array([[hash_text(f"{row['uri']} {row['version']}")] * SIZE for row in rows], np.float16)
            columns = [pa.array([row[name] for row in rows], MANIFEST_SCHEMA.field(name).type) for name in self.columns]
            features = numpy_to_vectors(vectors.reshape(-1, SIZE))
            return pa.RecordBatch.from_arrays([*columns, features], schema=pa.schema([*MANIFEST_SCHEMA, _FEATURES]))
        captions = [
            {
                **{name: row[name] for name in ("image_id", "uri", "version", "split")},
                "caption": f"word{row['features'][0]:.0f} of {row['image_id']}",
                "log_prob": -1.0,
                "tokens": 3,
                "candidates": [{"caption": f"word{row['features'][0]:.0f}", "log_prob": -1.0}],
            }
            for row in rows
        ]
        return pa.RecordBatch.from_pylist(captions, captions_schema())


_FEATURES = features_schema(SIZE, "float16").field("features")


def hash_text(text: str) -> int:
    return sum((position + 1) * ord(letter) for position, letter in enumerate(text)) % 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    equal = exact = updates = kills = pairs = 0
    with mock.patch("os.fsync"):  # the machine does not crash, so this only saves time
        for seed in range(options.seed, options.seed + options.histories):
            with tempfile.TemporaryDirectory(prefix="captionlib-history-") as name:
                history = History(Path(name), random.Random(seed))
                problem = history.run()
                if problem:
                    print(f"# history {seed}: {problem}")
            equal += not problem
            exact, updates = exact + history.exact, updates + history.updates
            kills, pairs = kills + history.kills, pairs + history.pairs
    print(f"# {updates} undisturbed updates, {kills} kills, {pairs} pairs of updates at the same time")
    report("histories-equal", equal / options.histories, 1)
    report("histories-exact", exact / max(1, updates), 1)


class History:
    """A random history of a table and of the collection that follows it."""

    def __init__(self, folder: Path, generator: random.Random) -> None:
        self.folder = folder
        self.random = generator
        self.table: Table = dict.fromkeys(generator.sample(NAMES, 12), (0, "a reference"))
        self.exact = self.updates = self.kills = self.pairs = 0

    def run(self) -> str:
        """Runs the history, and returns how the collection differs from a fresh one; empty if it does not."""
        self._update("collection")
        finished = True  # whether nothing is left to do from earlier updates
        for _ in range(self.random.randint(2, 6)):
            before = dict(self.table)
            self._change()
            action = self.random.random()
            if action < 0.5:
                finished = self._update_with_kills()
                continue
            if action < 0.7:
                finished = self._update_twice_at_once()
                continue
            expected = sorted(
                name for name, (version, _) in self.table.items() if before.get(name, (-1,))[0] != version
            )
            encoded, captioned = self._update("collection")
            if finished:
                readable = [name for name in expected if not name.endswith("7")]
                self.updates += 1
                self.exact += sorted(encoded) == expected and sorted(captioned) == readable
            finished = True
        self._update("collection")
        self._update("fresh")
        for kind in ("features", "captions"):
            incremental, fresh = (read_rows(self.folder / name / kind) for name in ("collection", "fresh"))
            if incremental != fresh:
                return f"the {kind} differ: {describe_difference(incremental, fresh)}"
        return self._compare_index()

    def _change(self) -> None:
        for name in self.random.sample(NAMES, self.random.randint(0, 8)):
            version, reference = self.table.get(name, (-1, ""))
            action = self.random.choice(["add", "change", "remove", "caption"])
            if action == "remove" and len(self.table) > 2:
                self.table.pop(name, None)
            elif action == "caption" and name in self.table:
                self.table[name] = (version, f"{reference}, again")
            else:
                self.table[name] = (version + 1, reference or "a reference")

    def _update_with_kills(self) -> bool:
        """Kills updates, and returns whether the last one finished."""
        for _ in range(self.random.randint(1, 3)):
            try:
                with kill_after(self.random.randint(0, 80)):
                    self._update("collection")
                return True
            except Killed:
                self.kills += 1
                Folder(self.folder / "collection" / "manifest").remove_file(LOCK_FILE)  # its process has ended
        return False

    def _update_twice_at_once(self) -> bool:
        """Runs two updates at the same time, of which one may fail, and returns whether both finished."""
        self.pairs += 1
        with ThreadPoolExecutor(2) as executor:
            runs = [executor.submit(self._update, "collection") for _ in range(2)]
        errors = [error for run in runs if (error := run.exception()) is not None]
        for error in errors:
            if not isinstance(error, CaptionlibError):
                raise error
        return not errors

    def _update(self, name: str) -> tuple[list[str], list[str]]:
        """Runs all stages. Returns the ids of the images that were encoded and captioned."""
        target = self.folder / name
        source = self.folder / f"table-{threading.get_ident()}.csv"
        with source.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_id", "uri", "version", "caption"])
            writer.writerows(
                [image_id, f"{image_id}.jpg", version, reference]
                for image_id, (version, reference) in self.table.items()
            )
        prepare(source, target / "manifest", CONFIG)
        features = StandIn("features")
        schema = pa.schema([*features_schema(SIZE, "float16")])
        run_stage(open_dataset(target / "manifest"), target / "features", schema, features)
        captions = StandIn("captions")
        run_stage(open_dataset(target / "features"), target / "captions", captions_schema(), captions)
        build = plan_build(target / "captions", None, target / "index", IndexConfig())
        if not build.is_done():
            build.train()
            for position in build.added:
                build.add_shard(position)
            build.finish()
        return features.processed, captions.processed

    def _compare_index(self) -> str:
        index = open_index(self.folder / "collection" / "index")
        captions = read_rows(self.folder / "fresh" / "captions")
        for name in NAMES:
            try:
                found = index.get_image(name)["caption"]
            except CaptionlibError:
                found = None
            expected = captions.get(name, {}).get("caption")
            if found != expected:
                return f"the index says {found!r} about {name}, expected {expected!r}"
        return ""


def run_stage(source: ShardedDataset, output: Path, schema: pa.Schema, stage: StandIn) -> None:
    dataset = create_dataset(
        output, stage.kind, schema, config={"stand-in": stage.kind}, source=source.require_complete()
    )
    job = ShardJob(source, (dataset,), stage)
    if pending := job.pending_shards():
        job.mark_incomplete()
        with stage.open() as process:
            for shard in pending:
                job.run(shard, process)
    job.finish(1.0)


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows and failures of a complete dataset by image id."""
    dataset = open_dataset(folder).require_complete()
    rows: dict[str, dict[str, Any]] = {}
    for shard in range(dataset.shards):
        failures = dataset.read_failures(shard)
        for row in [*dataset.read(shard).to_pylist(), *(failures.to_pylist() if failures is not None else [])]:
            if row["image_id"] in rows:
                raise AssertionError(f"{row['image_id']} occurs twice")
            rows[row["image_id"]] = row
    return rows


def describe_difference(incremental: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    names = [name for name in {**incremental, **fresh} if incremental.get(name) != fresh.get(name)]
    return f"{names[0]}: {incremental.get(names[0])}, expected {fresh.get(names[0])}"


if __name__ == "__main__":
    run_benchmark(main)
