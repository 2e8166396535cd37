from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.simulated_kills import Killed
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import Marker, write_marker
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema, embeddings_schema
from captionlib.data.shards.stages import ProcessRows, ReportFailure, ShardJob
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError, DatasetError, FetchError, FingerprintError
from captionlib.storage.folders import Folder

Row = dict[str, Any]


@dataclass(frozen=True)
class Describe:
    """Writes a caption and an embedding. Images in `broken` fail, and `seen` records the ids of processed images."""

    broken: set[str] = field(default_factory=set)
    seen: list[str] = field(default_factory=list)
    columns: Sequence[str] = ("image_id", "uri", "version", "split")

    @contextmanager
    def open(self) -> Iterator[ProcessRows]:
        def process(batches: Iterator[pa.RecordBatch], fail: ReportFailure) -> Iterator[tuple[pa.RecordBatch, ...]]:
            for batch in batches:
                rows = batch.to_pylist()
                self.seen.extend(row["image_id"] for row in rows)
                for row in rows:
                    if row["image_id"] in self.broken:
                        fail(row, FetchError("Gone", "not there"))
                kept = [row for row in rows if row["image_id"] not in self.broken]
                texts = [
                    {**row, "caption": f"{row['uri']} {row['version']}", "log_prob": 0, "tokens": 1, "candidates": []}
                    for row in kept
                ]
                vectors = [{**row, "embedding": [1.0]} for row in kept]
                yield (
                    pa.RecordBatch.from_pylist(texts, schema=captions_schema()),
                    pa.RecordBatch.from_pylist(vectors, schema=embeddings_schema(1)),
                )

        yield process


def image(name: str, version: str | None = "1", **columns: Any) -> Row:
    return {"image_id": name, "uri": f"{name}.jpg", "version": version, "split": "", "captions": [], **columns}


def write_manifest(folder: Path, *shards: Sequence[Row]) -> ShardedDataset:
    """Writes a manifest, or updates those of its shards whose rows have changed."""
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={}, shards=len(shards))
    dataset.mark_incomplete()
    for shard, rows in enumerate(shards):
        new = pa.Table.from_pylist(list(rows), MANIFEST_SCHEMA)
        if dataset.read_marker(shard) is None or not dataset.read(shard).equals(new):
            with write_shard(dataset, shard, len(rows)) as writer:
                writer.write(pa.RecordBatch.from_pylist(list(rows), schema=MANIFEST_SCHEMA))
    dataset.finish()
    return dataset


FIRST, SECOND = ([image(f"{shard}{number}") for number in range(5)] for shard in range(2))


@pytest.fixture
def source(tmp_path: Path) -> ShardedDataset:
    return write_manifest(tmp_path / "source", FIRST, SECOND)


def create_job(source: ShardedDataset, tmp_path: Path, stage: Describe, **options: bool) -> ShardJob:
    captions = create_dataset(tmp_path / "captions", "captions", captions_schema(), config={}, source=source)
    embeddings = create_dataset(tmp_path / "vectors", "embeddings", embeddings_schema(1), config={}, source=source)
    return ShardJob(source, (captions, embeddings), stage, **options)


def run(job: ShardJob) -> None:
    with job.stage.open() as process:
        for shards in job.plan():
            job.mark_incomplete()
            for shard in shards:
                job.run(shard, process)
    job.finish(1.0)


def run_once(source: ShardedDataset, tmp_path: Path, broken: str = "", **options: bool) -> list[str]:
    """Runs the job and returns the ids of the images that were processed."""
    stage = Describe(set(broken.split()))
    run(create_job(source, tmp_path, stage, **options))
    return stage.seen


def read_ids(dataset: ShardedDataset, shard: int) -> list[str]:
    found: list[str] = dataset.read(shard)["image_id"].to_pylist()
    return found


def read_outputs(tmp_path: Path) -> list[list[Row]]:
    """Returns all rows and failures of the outputs."""
    found: list[list[Row]] = []
    for name in ("captions", "vectors"):
        dataset = open_dataset(tmp_path / name).require_complete()
        for shard in range(dataset.shards):
            failures = dataset.read_failures(shard)
            found += [dataset.read(shard).to_pylist(), [] if failures is None else failures.to_pylist()]
    return found


def test_each_image_becomes_a_row_or_a_failure_of_each_output(source: ShardedDataset, tmp_path: Path) -> None:
    done = create_job(source, tmp_path, Describe({"01", "14"}))
    run(done)
    for output in done.outputs:
        assert read_ids(output, 0) == ["00", "02", "03", "04"]
        assert read_ids(output, 1) == ["10", "11", "12", "13"]
        failures = output.read_failures(1)
        assert failures is not None
        assert failures.to_pylist() == [
            {
                "image_id": "14",
                "uri": "14.jpg",
                "version": "1",
                "stage": "fetch",
                "error": "Gone",
                "message": "not there",
            }
        ]
        assert output.is_complete()


def test_finished_shards_are_skipped(source: ShardedDataset, tmp_path: Path) -> None:
    stage = Describe()
    first = create_job(source, tmp_path, stage)
    with stage.open() as process:
        first.run(0, process)
        first.run(0, process)
    run(create_job(source, tmp_path, stage))
    assert sorted(stage.seen) == [f"{shard}{n}" for shard in range(2) for n in range(5)]


def test_shard_without_one_output_is_processed_again(source: ShardedDataset, tmp_path: Path) -> None:
    first = create_job(source, tmp_path, Describe())
    run(first)
    first.outputs[1].remove_marker(1)
    assert first.pending_shards() == [1]
    run(first)
    assert first.pending_shards() == []


def test_retry_processes_failed_images_only_and_keeps_the_order(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, "01 03 14")
    again = Describe({"03"})
    retried = create_job(source, tmp_path, again, retry_failures=True)
    assert retried.pending_shards() == [0, 1]
    run(retried)
    assert again.seen == ["01", "03", "14"]
    for output in retried.outputs:
        assert read_ids(output, 0) == ["00", "01", "02", "04"]
        assert read_ids(output, 1) == ["10", "11", "12", "13", "14"]
        assert [output.read_markers()[shard].failures for shard in range(2)] == [1, 0]
        assert output.read_failures(1) is None
        assert output.verify() == []


def test_unsuccessful_retry_changes_no_rows(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, "01")
    before = read_outputs(tmp_path)
    checksums = [marker.checksum for marker in open_dataset(tmp_path / "captions").read_markers().values()]
    assert run_once(source, tmp_path, "01", retry_failures=True) == ["01"]
    assert read_outputs(tmp_path) == before
    assert checksums == [marker.checksum for marker in open_dataset(tmp_path / "captions").read_markers().values()]


def test_failures_are_not_retried_by_default(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, "01")
    assert create_job(source, tmp_path, Describe()).pending_shards() == []


def test_update_processes_new_and_changed_images_only(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, "03 12")
    before = open_dataset(tmp_path / "captions").read_marker(1)
    changed = [image("00", "2"), image("new"), *FIRST[2:], image("last")]  # 01 is gone
    updated = write_manifest(tmp_path / "source", changed, SECOND)
    assert create_job(updated, tmp_path, Describe()).pending_shards() == [0]
    assert run_once(updated, tmp_path, "new") == ["00", "new", "last"]
    captions = open_dataset(tmp_path / "captions")
    assert read_ids(captions, 0) == ["00", "02", "04", "last"]
    failures = captions.read_failures(0)
    assert failures is not None
    assert failures["image_id"].to_pylist() == ["new", "03"]  # in the order of the input
    assert captions.read_marker(1) == before
    outputs = read_outputs(tmp_path)
    run(create_job(updated, tmp_path / "fresh", Describe({"new", "03", "12"})))
    assert outputs == read_outputs(tmp_path / "fresh")


def test_total_time_of_a_shard_includes_its_earlier_versions(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    dataset = open_dataset(tmp_path / "captions")
    first = dataset.read_markers()
    assert all(marker.total_seconds == marker.seconds for marker in first.values())
    write_marker(dataset.folder, replace(first[0], seconds=50.0, total_seconds=100.0))
    run_once(write_manifest(tmp_path / "source", [*FIRST, image("new")], SECOND), tmp_path)
    marker = dataset.read_markers()[0]
    assert marker.total_seconds == pytest.approx(100 + marker.seconds)
    assert dataset.compute_totals().total_seconds == pytest.approx(marker.total_seconds + first[1].seconds)


def test_update_adds_shards(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    updated = write_manifest(tmp_path / "source", FIRST, SECOND, [image("20")])
    job = create_job(updated, tmp_path, Describe())
    assert not job.outputs[0].is_complete()
    assert job.pending_shards() == [2]
    assert run_once(updated, tmp_path) == ["20"]
    assert read_ids(open_dataset(tmp_path / "captions").require_complete(), 2) == ["20"]


def test_update_removes_shards(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, "13")
    updated = write_manifest(tmp_path / "source", FIRST)
    assert run_once(updated, tmp_path) == []
    captions = open_dataset(tmp_path / "captions").require_complete()
    assert captions.shards == 1
    assert captions.folder.list() == ["_SUCCESS", "__failures", "__shards", "_dataset.json", "part-00000.parquet"]
    assert captions.folder.list("__failures") == []


def test_columns_that_the_stage_does_not_compute_come_from_the_new_input(
    source: ShardedDataset, tmp_path: Path
) -> None:
    run_once(source, tmp_path, "04")
    moved = [{**row, "split": "test", "uri": f"moved/{row['uri']}"} for row in FIRST]
    assert run_once(write_manifest(tmp_path / "source", moved, SECOND), tmp_path) == []
    captions = open_dataset(tmp_path / "captions")
    assert captions.read(0, ["split"])["split"].to_pylist() == ["test"] * 4
    assert captions.read(0, ["uri"])["uri"].to_pylist() == [row["uri"] for row in moved[:4]]
    assert captions.read(0, ["caption"])["caption"].to_pylist() == [f"{row['uri']} 1" for row in FIRST[:4]]
    failures = captions.read_failures(0)
    assert failures is not None
    assert failures["uri"].to_pylist() == ["moved/04.jpg"]


def test_images_without_a_version_are_compared_by_uri(tmp_path: Path) -> None:
    rows = [image(name, None) for name in ("a", "b", "c", "d")]
    run_once(write_manifest(tmp_path / "source", rows), tmp_path)
    rows = [rows[0], image("b", None, uri="other.jpg"), image("c", "1"), image("d", "1", uri="other.jpg")]
    assert run_once(write_manifest(tmp_path / "source", rows), tmp_path) == ["b", "d"]
    rows = [image("a", "1"), rows[1], image("c", "2"), rows[3]]
    assert run_once(write_manifest(tmp_path / "source", rows), tmp_path) == ["c"]


def test_images_that_the_previous_stage_recovered_are_processed(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, "01 12")
    captions = open_dataset(tmp_path / "captions").require_complete()
    assert run_once(captions, tmp_path / "next", "02") == [
        *("00", "02", "03", "04"),
        *("10", "11", "13", "14"),
    ]
    run_once(source, tmp_path, retry_failures=True)
    assert run_once(open_dataset(tmp_path / "captions").require_complete(), tmp_path / "next") == ["01", "12"]
    recovered = open_dataset(tmp_path / "next" / "captions").require_complete()
    assert read_ids(recovered, 0) == ["00", "01", "03", "04"]  # the failure of 02 is kept


def test_resumed_run_starts_missing_shards_before_it_reads_markers(
    source: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_manifest(tmp_path / "source", FIRST, SECOND, [image("20")], [image("30")])
    run_once(source, tmp_path)
    job = create_job(source, tmp_path, Describe())
    (tmp_path / "captions" / "__shards" / "part-00001.json").unlink()
    (tmp_path / "vectors" / "part-00003.parquet").unlink()
    damage(tmp_path / "vectors" / "__shards" / "part-00002.json")
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read_many", lambda *_: pytest.fail("reads a marker"))
        plan = job.plan()
        assert next(plan) == [1, 3]
    with job.stage.open() as process:
        for shard in (1, 3):
            job.run(shard, process)
    assert list(plan) == [[2]]
    run(job)
    assert list(job.plan()) == []


def test_missing_and_stale_shards_are_processed_together(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    updated = write_manifest(tmp_path / "source", [*FIRST, image("new")], SECOND, [image("20")])
    assert list(create_job(updated, tmp_path, Describe()).plan()) == [[0, 2]]
    run(create_job(updated, tmp_path, Describe()))
    assert list(create_job(updated, tmp_path, Describe()).plan()) == []


@pytest.mark.parametrize("option", ["retry_failures", "verify"])
def test_missing_shards_and_shards_to_check_are_processed_together(
    source: ShardedDataset, tmp_path: Path, option: str
) -> None:
    run_once(source, tmp_path, "03")
    (tmp_path / "captions" / "__shards" / "part-00001.json").unlink()
    assert list(create_job(source, tmp_path, Describe(), **{option: True}).plan()) == [[0, 1]]


def test_outputs_of_another_manifest_are_refused(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    other = create_dataset(tmp_path / "other", "manifest", MANIFEST_SCHEMA, config={"other": 1}, shards=1)
    with pytest.raises(
        FingerprintError, match=f"manifest_id {other.manifest_id}, got {source.manifest_id}.*update the manifest"
    ):
        create_job(other, tmp_path, Describe())


@pytest.mark.parametrize("written", range(7))
def test_shards_that_were_killed_between_two_files_are_finished(
    source: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Kills the update of a shard after it has published `written` files."""
    run_once(source, tmp_path, "03")
    updated = write_manifest(tmp_path / "source", [*FIRST[1:], image("new"), image("bad")], SECOND)
    job = create_job(updated, tmp_path, Describe({"bad"}))
    publish = Folder._publish_local
    published: list[str] = []

    def publish_some(folder: Folder, path: Path, target: Path) -> None:
        if len(published) == written:
            raise Killed
        published.append(target.name)
        publish(folder, path, target)

    with monkeypatch.context() as patch, job.stage.open() as process, pytest.raises(Killed):
        patch.setattr(Folder, "_publish_local", publish_some)
        job.mark_incomplete()
        job.run(0, process)
    for output in job.outputs:  # readers see the old or the new version
        assert read_ids(output, 0) in (["00", "01", "02", "04"], ["01", "02", "04", "new"])
    assert create_job(updated, tmp_path, Describe()).pending_shards() == [0]
    processed = run_once(updated, tmp_path, "bad")
    assert set(processed) <= {"new", "bad"}
    assert read_ids(open_dataset(tmp_path / "captions").require_complete(), 0) == ["01", "02", "04", "new"]
    outputs = read_outputs(tmp_path)
    run(create_job(updated, tmp_path / "fresh", Describe({"bad", "03"})))
    assert outputs == read_outputs(tmp_path / "fresh")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_processes_damaged_shards_again(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, "13")
    expected = read_outputs(tmp_path)
    damage(tmp_path / "captions" / "part-00000.parquet")
    damage(tmp_path / "vectors" / "__failures" / "part-00001.parquet")
    assert run_once(source, tmp_path) == []
    with pytest.raises(DamagedShardError, match="captions with --verify"):
        read_outputs(tmp_path)
    assert run_once(source, tmp_path, "13", verify=True) == ["00", "01", "02", "03", "04"]
    assert read_outputs(tmp_path) == expected


def test_verify_does_not_copy_damaged_rows_of_shards_without_block_checksums(
    source: ShardedDataset, tmp_path: Path
) -> None:
    run_once(source, tmp_path)
    captions = open_dataset(tmp_path / "captions")
    expected, marker = captions.read(0), captions.read_marker(0)
    assert marker is not None
    with write_shard(captions, 0, expected.num_rows, marker.input_checksum) as writer:
        writer.write(expected.set_column(7, captions.schema.field("caption"), pa.array(["wrong"] * expected.num_rows)))
    size = (tmp_path / "captions" / "part-00000.parquet").stat().st_size
    write_marker(captions.folder, replace(marker, blocks="", bytes=size))
    assert run_once(source, tmp_path, verify=True) == ["00", "01", "02", "03", "04"]
    assert open_dataset(tmp_path / "captions").read(0).equals(expected)


def test_damaged_rows_are_not_copied(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    damage(tmp_path / "vectors" / "part-00000.parquet")
    updated = write_manifest(tmp_path / "source", [*FIRST, image("new")], SECOND)
    assert run_once(updated, tmp_path) == ["00", "01", "02", "03", "04", "new"]


def test_damaged_input_is_not_processed(source: ShardedDataset, tmp_path: Path) -> None:
    damage(tmp_path / "source" / "part-00001.parquet")
    with pytest.raises(DamagedShardError, match=r"source/part-00001.parquet is damaged .*source with --overwrite"):
        run_once(source, tmp_path)
    assert open_dataset(tmp_path / "captions").pending_shards() == [1]


def test_unfinished_input_is_not_processed(source: ShardedDataset, tmp_path: Path) -> None:
    source.remove_marker(1)
    with pytest.raises(DatasetError, match="part-00001 is not finished; rerun the command that writes"):
        run_once(source, tmp_path)


def test_input_that_is_replaced_while_it_is_read_is_read_again(
    source: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_marker, replaced = ShardedDataset.read_marker, []

    def replace_then_read(dataset: ShardedDataset, shard: int) -> Marker | None:
        marker = read_marker(dataset, shard)
        if dataset == source and not replaced:
            replaced.append(shard)
            write_manifest(tmp_path / "source", [*FIRST, image("new")], SECOND)
        return marker

    job = create_job(source, tmp_path, Describe())
    monkeypatch.setattr(ShardedDataset, "read_marker", replace_then_read)
    with job.stage.open() as process:
        job.run(0, process)
    assert replaced == [0]
    assert read_ids(job.outputs[0], 0) == ["00", "01", "02", "03", "04", "new"]
