import json
import shutil
from dataclasses import replace
from pathlib import Path
from time import struct_time
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import compute_fingerprint
from captionlib.data.shards.schemas import (
    COLUMN_DESCRIPTIONS,
    DUPLICATES_SCHEMA,
    FAILURES_SCHEMA,
    MANIFEST_SCHEMA,
    captions_schema,
    embeddings_schema,
    features_schema,
)
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError, DatasetError, DecodeError, FailureRatioError, FingerprintError


def rows(*ids: str) -> pa.RecordBatch:
    values = [{"image_id": one, "uri": f"{one}.jpg", "split": "train", "captions": ["a dog"]} for one in ids]
    return pa.RecordBatch.from_pylist(values, schema=MANIFEST_SCHEMA)


def create(folder: object, config: dict[str, Any] | None = None, **options: Any) -> ShardedDataset:
    return create_dataset(
        str(folder), "manifest", MANIFEST_SCHEMA, config=config or {"a": {"b": 1}}, shards=2, **options
    )


def fill(dataset: ShardedDataset) -> None:
    with write_shard(dataset, 0, 2) as writer:
        writer.write(rows("x", "y"))
    with write_shard(dataset, 1, 3) as writer:
        writer.write(rows("z"))
        writer.write_failure({"image_id": "bad1", "uri": "bad1.jpg"}, DecodeError("Truncated", "ends early"))
        writer.write_failure({"image_id": "bad2", "uri": "bad2.jpg"}, DecodeError("Truncated", "ends early"))


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "data") if request.param == "local" else f"memory://shards-{tmp_path.name}"


def test_dataset_round_trip(place: str) -> None:
    dataset = create(place)
    assert dataset.pending_shards() == [0, 1]
    fill(dataset)
    assert dataset.pending_shards() == []
    totals = dataset.finish()
    opened = open_dataset(place, "manifest").require_complete()
    assert opened == dataset
    assert opened.read(0)["image_id"].to_pylist() == ["x", "y"]
    assert [batch.num_rows for batch in opened.read_batches(0, ["uri"], batch_size=1)] == [1, 1]
    assert (totals.rows, totals.failures, totals.images, totals.reasons) == (3, 2, 5, {"Truncated": 2})
    failures = opened.read_failures(1)
    assert failures is not None
    assert failures["image_id"].to_pylist() == ["bad1", "bad2"]
    assert failures["stage"].to_pylist() == ["decode", "decode"]
    assert opened.read_failures(0) is None
    assert opened.verify() == []


def test_description_holds_everything_about_a_dataset(tmp_path: Path) -> None:
    source = replace(create(tmp_path / "source"), compaction_id="compacted")
    fill(source)
    output = create_dataset(
        tmp_path / "output", "captions", captions_schema(), config={"a": 1}, source=source, manifest_id="manifest"
    )
    assert output.source_checksum == source.compute_content_checksum()
    assert open_dataset(tmp_path / "output") == output


def test_resumed_dataset_keeps_its_creation_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.gmtime", lambda: struct_time((2020, 1, 2, 3, 4, 5, 0, 1, 0)))
    create(tmp_path)
    monkeypatch.undo()
    create_dataset(tmp_path, "manifest", MANIFEST_SCHEMA, config={"a": {"b": 1}}, shards=3)
    description = json.loads((tmp_path / "_dataset.json").read_text())
    assert (description["shards"], description["created"]) == (3, "2020-01-02T03:04:05Z")


def test_all_columns_are_described() -> None:
    schemas = [
        captions_schema(4, has_scores=True),
        features_schema(1, "float16"),
        embeddings_schema(1),
        MANIFEST_SCHEMA,
    ]
    names = {name for schema in (*schemas, DUPLICATES_SCHEMA, FAILURES_SCHEMA) for name in schema.names}
    assert names == COLUMN_DESCRIPTIONS.keys()


def test_row_groups_are_written_once_and_as_soon_as_they_are_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captionlib.data.shards.writer.ROW_GROUP_ROWS", 2)
    dataset = create(tmp_path)
    with write_shard(dataset, 0, 5) as writer:
        for name in "abcde":
            writer.write(rows(name))
    assert dataset.read(0)["image_id"].to_pylist() == list("abcde")
    metadata = pq.ParquetFile(tmp_path / "part-00000.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2, 2, 1]


def test_marker_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = create(tmp_path / "data")
    written: list[str] = []
    publish = type(dataset.folder)._publish_local

    def note(self: object, path: Path, target: Path) -> None:
        written.append(str(target.relative_to(tmp_path / "data")))
        publish(dataset.folder, path, target)

    monkeypatch.setattr(type(dataset.folder), "_publish_local", note)
    fill(dataset)
    assert written == [
        "part-00000.parquet",
        "__shards/part-00000.json",
        "part-00001.parquet",
        "__failures/part-00001.parquet",
        "__shards/part-00001.json",
    ]


def test_failed_shard_leaves_no_files(place: str) -> None:
    dataset = create(place)
    with pytest.raises(RuntimeError, match="died"), write_shard(dataset, 0, 2) as writer:
        writer.write(rows("x"))
        raise RuntimeError("died")
    assert dataset.pending_shards() == [0, 1]
    assert not dataset.folder.exists("part-00000.parquet")


def test_rows_and_failures_must_add_up_to_the_input(place: str) -> None:
    dataset = create(place)
    expected = "expected 3 rows and failures together, got 1 rows and 0 failures"
    with pytest.raises(DatasetError, match=expected), write_shard(dataset, 0, 3) as writer:
        writer.write(rows("x"))
    assert dataset.pending_shards() == [0, 1]


def test_rewritten_shard_drops_old_failures(place: str) -> None:
    dataset = create(place)
    fill(dataset)
    with write_shard(dataset, 1, 1) as writer:
        writer.write(rows("z"))
    assert dataset.read_failures(1) is None


def test_create_rejects_another_configuration(place: str) -> None:
    fill(create(place))
    with pytest.raises(FingerprintError, match=r"a\.b: was 1, now 2"):
        create(place, {"a": {"b": 2}})
    assert open_dataset(place).read(0).num_rows == 2
    replaced = create(place, {"a": {"b": 2}}, overwrite=True)
    assert replaced.pending_shards() == [0, 1]
    assert not replaced.folder.exists("part-00000.parquet")


@pytest.mark.parametrize("overwrite", [False, True])
def test_input_is_not_replaced_by_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    monkeypatch.chdir(tmp_path)
    source = create("data")
    fill(source)
    with pytest.raises(ConfigError, match="is the input of this command; use another folder for the output"):
        create_dataset(
            f"{tmp_path}/data/", "captions", captions_schema(), config={}, source=source, overwrite=overwrite
        )
    assert source.pending_shards() == []


def test_create_rejects_folders_with_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match=r"files that captionlib did not write \(thesis.txt\)"):
            create(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("removed_after", ["creation", "first shard", "last shard"])
def test_command_whose_folder_is_removed_fails_and_can_run_again(tmp_path: Path, removed_after: str) -> None:
    dataset = create(tmp_path / "data")
    for moment in ("creation", "first shard", "last shard"):
        if moment == removed_after:
            shutil.rmtree(tmp_path / "data")
        if moment != "last shard":
            with write_shard(dataset, int(moment == "first shard"), 1) as writer:
                writer.write(rows("x"))
    with pytest.raises(DatasetError, match=r"was removed or moved while .*; run|2 finished shards, got [01]"):
        dataset.finish()
    again = create(tmp_path / "data")
    assert again.pending_shards() == [0, 1]
    fill(again)
    again.finish()
    assert again.read(0)["image_id"].to_pylist() == ["x", "y"]


def test_folder_that_is_removed_at_the_end_is_not_reported_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(dataset := create(tmp_path / "data"))
    totals = dataset.compute_totals()
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(ShardedDataset, "compute_totals", lambda _: totals)
    with pytest.raises(DatasetError, match="data was removed or moved while it was being written"):
        dataset.finish()


def test_remains_of_a_removed_folder_are_told_from_foreign_files(tmp_path: Path) -> None:
    fill(create(tmp_path / "data"))
    (tmp_path / "data/_dataset.json").unlink()
    (tmp_path / "data/part-00000-of-00002.parquet").touch()
    with pytest.raises(DatasetError, match=r"did not write \(part-00000-of-00002.parquet\)"):
        create(tmp_path / "data")
    assert (tmp_path / "data/part-00000.parquet").exists()


def test_incomplete_dataset_is_rejected(place: str) -> None:
    dataset = create(place)
    with write_shard(dataset, 0, 1) as writer:
        writer.write(rows("x"))
    with pytest.raises(DatasetError, match="expected 2 finished shards, got 1"):
        dataset.finish()
    with pytest.raises(DatasetError, match="is not complete: expected 2 finished shards, got 1;"):
        open_dataset(place).require_complete()


def test_too_many_failures_fail_but_keep_the_rows(place: str) -> None:
    dataset = create(place)
    fill(dataset)
    with pytest.raises(
        FailureRatioError, match=r"2 of 5 images \(40.0%\) failed \(Truncated: 2\); expected at most 10.0%"
    ):
        dataset.finish(0.1)
    with pytest.raises(DatasetError, match=r"2 of 5 images \(40.0%\) failed .*, more .* --max-failure-ratio"):
        dataset.require_complete()
    assert dataset.finish(0.4).rows == 3


def test_failures_do_not_fail_a_run_unless_all_images_failed(place: str) -> None:
    dataset = create(place)
    fill(dataset)
    assert dataset.finish().failures == 2
    unreadable = create(f"{place}-unreadable")
    for shard in range(unreadable.shards):
        with write_shard(unreadable, shard, 1) as writer:
            writer.write_failure({"image_id": f"{shard}", "uri": "missing.jpg"}, DecodeError("Truncated", "ends early"))
    with pytest.raises(
        FailureRatioError, match=r"2 of 2 images \(100.0%\) failed .*; expected at least one readable image"
    ):
        unreadable.finish()
    assert unreadable.finish(1.0).rows == 0


def test_markers_with_another_fingerprint_are_ignored(tmp_path: Path) -> None:
    dataset = create(tmp_path / "data")
    fill(dataset)
    marker = tmp_path / "data" / "__shards" / "part-00000.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "fingerprint": "another"}))
    assert dataset.read_marker(0) is None
    with pytest.raises(DatasetError, match="finished shards, got 1"):
        dataset.finish()


def test_verify_reports_changed_files(tmp_path: Path) -> None:
    dataset = create(tmp_path / "data")
    fill(dataset)
    pq.write_table(pa.Table.from_batches([rows("other")]), tmp_path / "data" / "part-00000.parquet")
    (tmp_path / "data" / "part-00001.parquet").unlink()
    problems = dataset.verify()
    assert [problem.split(":")[0] for problem in problems] == ["part-00000.parquet", "part-00001.parquet"]
    assert problems[1].endswith("missing")


def test_top_level_contains_only_complete_parquet_files(tmp_path: Path) -> None:
    dataset = create(tmp_path / "data")
    fill(dataset)
    dataset.finish()
    visible = [path.name for path in (tmp_path / "data").iterdir() if not path.name.startswith("_")]
    assert sorted(visible) == ["part-00000.parquet", "part-00001.parquet"]
    assert pq.ParquetDataset(tmp_path / "data").read().num_rows == 3


def test_open_rejects_other_folders_and_kinds(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is not a captionlib dataset: expected a folder with _dataset.json"):
        open_dataset(tmp_path)
    create(tmp_path / "data")
    with pytest.raises(DatasetError, match="expected a dataset of kind captions, got manifest"):
        open_dataset(tmp_path / "data", "captions")


def test_fingerprint_ignores_key_order() -> None:
    assert compute_fingerprint("features", {"a": 1, "b": [2]}) == compute_fingerprint("features", {"b": [2], "a": 1})
    assert compute_fingerprint("features", {"a": 1}) != compute_fingerprint("features", {"a": 2})
    assert compute_fingerprint("features", {"a": 1}) != compute_fingerprint("captions", {"a": 1})


def test_ids_have_a_bloom_filter(tmp_path: Path) -> None:
    dataset = create(tmp_path / "data")
    fill(dataset)
    metadata = pq.ParquetFile(tmp_path / "data" / "part-00000.parquet").metadata
    assert metadata.row_group(0).column(0).bloom_filter_offset


def test_other_tools_read_the_folder_as_it_is(tmp_path: Path) -> None:
    fill(create(tmp_path / "data"))
    folder = str(tmp_path / "data")
    expected = duckdb.sql(f"SELECT image_id FROM '{folder}/*.parquet' ORDER BY image_id").to_arrow_table()
    assert pq.read_table(folder, columns=["image_id"]).sort_by("image_id")["image_id"].to_pylist() == [
        row["image_id"] for row in expected.to_pylist()
    ]


def test_footer_of_a_file_names_its_recipe(tmp_path: Path) -> None:
    dataset = create(tmp_path / "data")
    fill(dataset)
    contents = [(tmp_path / "data" / f"part-0000{shard}.parquet").read_bytes() for shard in range(2)]
    metadata = pq.read_metadata(tmp_path / "data" / "part-00000.parquet").metadata
    assert json.loads(metadata[b"captionlib"]) == {
        "kind": dataset.kind,
        "fingerprint": dataset.fingerprint,
        "config": dataset.config,
    }
    other = create(tmp_path / "other")
    fill(other)
    assert [(tmp_path / "other" / f"part-0000{shard}.parquet").read_bytes() for shard in range(2)] == contents


def test_shard_that_is_finished_during_the_check_is_an_error_to_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    monkeypatch.setattr(ShardedDataset, "pending_shards", lambda _: [])
    with pytest.raises(DatasetError, match="expected 1 finished shards, got 0; run the command again"):
        dataset.finish()
