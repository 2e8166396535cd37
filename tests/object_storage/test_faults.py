"""Datasets and images on a failing store: each image becomes one row or failure, and no partial file is visible."""

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from tenacity import stop_after_delay

from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.stages import ProcessRows, ReportFailure, ShardJob
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError, StorageError
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.search.sql.session import query_sql
from captionlib.storage import retries
from captionlib.storage.folders import Folder
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig
from tests.object_storage.conftest import COLORS
from tests.object_storage.faults import Fault, FaultyProxy

SHARDS = 3
NAMES = [*COLORS, "none"]
QUICK = FetchConfig(attempts=8, backoff_seconds=0.01, timeout_seconds=0.5)


class RandomFaults:
    """Chooses random faults, at most three per method and path, so that retries succeed."""

    def __init__(self, faults: Sequence[Fault], ratio: float = 0.3, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._faults = faults
        self._ratio = ratio
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> Fault | None:
        with self._lock:
            if self._random.random() > self._ratio or self._counts[method, path] == 3:
                return None
            self._counts[method, path] += 1
            return self._random.choice(self._faults)


@dataclass(frozen=True)
class FetchImages:
    """A stage without a model: replaces the split by the size of the image file."""

    columns: Sequence[str] = tuple(MANIFEST_SCHEMA.names)

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        with ImageFetcher(QUICK) as fetcher, ThreadPoolExecutor(4) as threads:

            def process(batches: Iterator[pa.RecordBatch], fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
                for batch in batches:
                    done = []
                    rows = batch.to_pylist()
                    for row, content in zip(rows, threads.map(fetch, [row["uri"] for row in rows]), strict=True):
                        if isinstance(content, FetchError):
                            fail(row, content)
                        else:
                            done.append({**row, "split": str(len(content))})
                    yield (pa.RecordBatch.from_pylist(done, schema=MANIFEST_SCHEMA),)

            def fetch(uri: str) -> bytes | FetchError:
                try:
                    return fetcher.fetch(uri)
                except FetchError as error:
                    return error

            yield process


def write_manifest(folder: str) -> ShardedDataset:
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={}, shards=SHARDS)
    for shard in range(SHARDS):
        rows = [
            {"image_id": f"{shard}-{name}", "uri": f"s3://bucket/images/{name}.png", "split": "", "captions": ["a"]}
            for name in NAMES
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
    dataset.finish()
    return dataset


def run_job(source: ShardedDataset, output: str) -> ShardedDataset:
    target = create_dataset(output, "manifest", MANIFEST_SCHEMA, config={"input": source.fingerprint}, shards=SHARDS)
    job = ShardJob(source, (target,), FetchImages())
    with job.stage.open() as process:
        for shard in job.pending_shards():
            job.run(shard, process)
    job.finish(0.5)
    return target


def read_all(dataset: ShardedDataset) -> list[object]:
    rows: list[object] = []
    for shard in range(dataset.shards):
        failures = dataset.read_failures(shard)
        rows += dataset.read(shard).to_pylist()
        rows += [] if failures is None else failures.select(["image_id", "uri", "stage", "error"]).to_pylist()
    return rows


@pytest.fixture
def bucket(request: pytest.FixtureRequest, proxy: FaultyProxy) -> str:
    return f"s3://bucket/{abs(hash(request.node.name))}"


@pytest.mark.parametrize("fault", Fault)
def test_temporary_faults_do_not_change_the_output(
    bucket: str, proxy: FaultyProxy, fault: Fault, tmp_path: Path
) -> None:
    expected = read_all(run_job(write_manifest(str(tmp_path / "manifest")), str(tmp_path / "output")))
    proxy.choose = RandomFaults([fault], ratio=0.06 if fault is Fault.HANG else 0.3)
    output = run_job(write_manifest(f"{bucket}/manifest"), f"{bucket}/output")
    assert read_all(output) == expected
    assert output.verify() == []
    assert output.compute_totals().reasons == {"NotFound": SHARDS}
    assert open_dataset(f"{bucket}/output").is_complete()
    assert query_sql(f"{bucket}/output", "SELECT count(DISTINCT image_id) AS n FROM manifest").to_pylist() == [
        {"n": SHARDS * len(COLORS)}
    ]
    assert sum(request.fault is fault for request in proxy.requests) > 5


def test_markers_are_written_after_their_data(bucket: str, proxy: FaultyProxy) -> None:
    source = write_manifest(f"{bucket}/manifest")
    proxy.choose = RandomFaults([Fault.ERROR, Fault.CUT], ratio=0.4)
    proxy.requests.clear()
    run_job(source, f"{bucket}/output")
    written = [path.removeprefix(f"/{bucket.removeprefix('s3://')}/output/") for path in proxy.succeeded("PUT")]
    for shard in range(SHARDS):
        data, failures, marker = (
            [place for place, name in enumerate(written) if name == f"{folder}part-{shard:05d}.{kind}"]
            for folder, kind in (("", "parquet"), ("__failures/", "parquet"), ("__shards/", "json"))
        )
        assert max(data) < min(failures)
        assert max(failures) < min(marker)
    assert written[-1] == "_SUCCESS"


def test_outage_fails_the_run_without_partial_shards(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_manifest(f"{bucket}/manifest")
    monkeypatch.setattr(retries._retrying, "stop", stop_after_delay(0.2))
    proxy.choose = lambda method, path: (
        Fault.THROTTLE if method == "PUT" and path.endswith("output/__shards/part-00002.json") else None
    )
    with pytest.raises(StorageError, match=r"part-00002\.json: the storage failed for .* injected"):
        run_job(source, f"{bucket}/output")
    output = open_dataset(f"{bucket}/output")
    assert output.pending_shards() == [2]
    assert not output.is_complete()
    proxy.choose = lambda _method, _path: None
    proxy.requests.clear()
    assert run_job(source, f"{bucket}/output").verify() == []
    assert not any(path.endswith(("part-00000.parquet", "part-00001.parquet")) for path in proxy.succeeded("PUT"))


def test_unavailable_image_fails_and_others_become_rows(bucket: str, proxy: FaultyProxy) -> None:
    source = write_manifest(f"{bucket}/manifest")
    faults = {"red": Fault.THROTTLE, "green": Fault.CUT, "blue": Fault.ERROR}
    proxy.choose = lambda _method, path: faults.get(Path(path).stem) if "/images/" in path else None
    output = run_job(source, f"{bucket}/output")
    reasons = output.compute_totals().reasons
    assert reasons == {"ServerError": 2 * SHARDS, "NotFound": SHARDS, "ConnectionFailed": SHARDS}
    assert output.compute_totals().rows == SHARDS * (len(COLORS) - len(faults))


def test_read_many_survives_faults(bucket: str, proxy: FaultyProxy) -> None:
    folder = Folder(bucket)
    for number in range(40):
        folder.write(f"{number}.json", json.dumps(number).encode())
    proxy.choose = RandomFaults([Fault.ERROR, Fault.THROTTLE, Fault.CUT])
    wanted = [f"{number}.json" for number in range(41)]
    assert sorted(map(int, folder.read_many(wanted))) == list(range(40))


def test_extraction_with_faults_writes_identical_features(bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    encoder = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")
    config = ExtractionConfig(encoder, batch_size=4)
    run = RunConfig(progress=False, max_failure_ratio=0.5)
    source = write_manifest(f"{bucket}/manifest")
    extract_features(f"{bucket}/manifest", tmp_path / "features", config, run=run)
    proxy.choose = RandomFaults([Fault.ERROR, Fault.THROTTLE, Fault.CUT, Fault.SLOW])
    extract_features(f"{bucket}/manifest", f"{bucket}/features", config, run=run)
    assert source.shards == SHARDS
    assert read_all(open_dataset(f"{bucket}/features")) == read_all(open_dataset(tmp_path / "features"))
