"""Updates of a manifest equal a new manifest of the source, and are complete or absent after a kill."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.simulated_kills import Killed, kill_after
from captionlib.data.images.loading import hash_content
from captionlib.data.ingestion.changes import Changes
from captionlib.data.ingestion.prepare import PrepareConfig, PrepareSummary, prepare
from captionlib.data.ingestion.staging import StagedRows, read_manifest
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import JOURNAL_FILE, UPDATE_FOLDER
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.data.sources.rows import SourceOptions
from captionlib.errors import ConfigError, DamagedShardError, DatasetError, DuplicateIdError, LockError
from captionlib.storage.folders import Folder
from captionlib.storage.lock import LOCK_FILE, lock_folder

UPDATE = PrepareConfig(
    options=SourceOptions(version_column="version"), shard_size=3, check_images=False, allow_removal=True
)
Rows = dict[str, tuple[str, str]]  # id: version and caption


def write_source(path: Path, rows: Rows) -> Path:
    lines = [f"{name},{name}.jpg,{version},{caption}" for name, (version, caption) in rows.items()]
    path.write_text("\n".join(["id,url,version,caption", *lines]))
    return path


def update(folder: Path, rows: Rows, config: PrepareConfig = UPDATE, **options: Any) -> PrepareSummary:
    return prepare(write_source(folder / "source.csv", rows), folder / "manifest", config, **options)


def read_rows(folder: Path) -> Rows:
    dataset = open_dataset(folder / "manifest", "manifest").require_complete()
    assert dataset.verify() == []
    rows = [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]
    result = {row["image_id"]: (row["version"], row["captions"][0]) for row in rows}
    assert len(result) == len(rows)
    names = sorted(path.name for path in (folder / "manifest").glob("part-*"))
    assert names == [f"part-{shard:05d}.parquet" for shard in range(dataset.shards)]
    return result


def list_ids(folder: Path) -> list[list[str]]:
    dataset = open_dataset(folder / "manifest")
    return [dataset.read(shard)["image_id"].to_pylist() for shard in range(dataset.shards)]


def make_rows(names: str) -> Rows:
    return dict.fromkeys(names, ("1", "a dog"))


def test_update_writes_only_shards_that_changed(tmp_path: Path) -> None:
    update(tmp_path, make_rows("abcdefgh"))
    manifest_id = open_dataset(tmp_path / "manifest").manifest_id
    files = {path.name: path.stat().st_ino for path in (tmp_path / "manifest").glob("*.parquet")}
    rows = make_rows("xyabcdgh")  # new rows may come first, and e and f are missing
    rows["d"] = ("2", "a dog")
    summary = update(tmp_path, rows)
    assert summary.changes == Changes(new=2, changed=1, missing=2, unchanged=5)
    assert list_ids(tmp_path) == [["a", "b", "c"], ["d"], ["g", "h", "x"], ["y"]]
    assert read_rows(tmp_path) == rows
    written = {
        path.name for path in (tmp_path / "manifest").glob("*.parquet") if files.get(path.name) != path.stat().st_ino
    }
    assert written == {"part-00001.parquet", "part-00002.parquet", "part-00003.parquet"}
    assert open_dataset(tmp_path / "manifest").manifest_id == manifest_id
    assert not (tmp_path / "manifest" / UPDATE_FOLDER).exists()


def test_update_without_changes_writes_nothing(tmp_path: Path) -> None:
    update(tmp_path, make_rows("abcd"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "manifest").rglob("*")}
    assert update(tmp_path, make_rows("abcd")).already_prepared
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "manifest").rglob("*")} == before


def test_unchanged_rows_are_not_written_or_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update(tmp_path, make_rows("abcd"))
    for name in ("Comparison", "check_unique_ids"):
        monkeypatch.delattr(f"captionlib.data.ingestion.prepare.{name}")
    reports: list[Changes] = []
    assert update(tmp_path, make_rows("abcd"), report_changes=reports.append).already_prepared
    assert reports == [Changes(0, 0, 0, 4)]


@pytest.mark.parametrize("names", ["abcdefgh", "abcdefg", "abcd", "abcdefghij", "abcxefgh", "xabcdefgh", "hgfedcba"])
@pytest.mark.parametrize("append", [False, True])
def test_differences_are_found_in_any_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, append: bool
) -> None:
    monkeypatch.setattr("captionlib.data.ingestion.staging._BATCH_ROWS", 2)
    old, new = make_rows("abcdefgh"), make_rows(names)
    update(tmp_path, old)
    summary = update(tmp_path, new, replace(UPDATE, append=append))
    missing = set() if append else old.keys() - new.keys()
    expected = Changes(len(new.keys() - old.keys()), 0, len(missing), len(old.keys() & new.keys()))
    assert (summary.changes, summary.images) == (expected, len(new))
    assert read_rows(tmp_path) == {**new, **(old if append else {})}


def test_manifest_that_is_damaged_while_it_is_compared_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(tmp_path, make_rows("abcd"))

    def read(dataset: ShardedDataset) -> Iterator[tuple[int, pa.RecordBatch]]:
        (tmp_path / "manifest/part-00001.parquet").write_bytes(b"")
        yield from read_manifest(dataset)

    monkeypatch.setattr("captionlib.data.ingestion.changes.read_manifest", read)
    with pytest.raises(DamagedShardError, match=r"part-00001.parquet is damaged \(expected \d+ bytes"):
        update(tmp_path, make_rows("abcde"))


def test_duplicate_of_an_unchanged_row_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.data.ingestion.staging._BATCH_ROWS", 2)
    update(tmp_path, make_rows("abcd"))
    with (source := tmp_path / "source.csv").open("a") as file:
        file.write("\na,a.jpg,1,a dog")
    with pytest.raises(DuplicateIdError, match=r"got 2 with 'a': .*a\.jpg, and .*a\.jpg at .*line 6"):
        prepare(source, tmp_path / "manifest", UPDATE)
    assert read_rows(tmp_path) == make_rows("abcd")


@pytest.mark.parametrize("overwrite", [False, True])
def test_second_update_at_the_same_time_names_the_first(tmp_path: Path, overwrite: bool) -> None:
    refused = pytest.raises(LockError, match=rf"in use by `captionlib prepare` \(process {os.getpid()} on ")

    def prepare_again(changes: Changes) -> None:
        with refused:
            update(tmp_path, make_rows("b"), overwrite=overwrite)
        assert update(tmp_path, make_rows("b"), dry_run=True).changes == Changes(1, 0, 1, 0)

    update(tmp_path, make_rows("a"))
    update(tmp_path, make_rows("ac"), report_changes=prepare_again)
    assert read_rows(tmp_path) == make_rows("ac")
    assert not (tmp_path / "manifest" / LOCK_FILE).exists()


def test_second_first_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    with lock_folder(Folder(tmp_path / "manifest"), "captionlib prepare"), pytest.raises(LockError):
        update(tmp_path, make_rows("a"))
    stale = json.dumps({"process": -1, "host": socket.gethostname(), "command": "captionlib prepare"})
    (tmp_path / "manifest" / LOCK_FILE).write_text(stale)
    update(tmp_path, make_rows("a"))  # the lock of a killed process and the list of removed images are own files
    assert read_rows(tmp_path) == make_rows("a")


def test_first_run_does_not_replace_a_manifest_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captionlib.data.ingestion import prepare as module

    check = module.check_unique_ids

    def write_meanwhile(staged: StagedRows) -> None:
        monkeypatch.setattr(module, "check_unique_ids", check)
        update(tmp_path, make_rows("b"))

    monkeypatch.setattr(module, "check_unique_ids", write_meanwhile)
    with pytest.raises(DatasetError, match="another command wrote a manifest at the same time"):
        update(tmp_path, make_rows("a"))
    assert read_rows(tmp_path) == make_rows("b")


def test_changes_are_reported_before_anything_is_written(tmp_path: Path) -> None:
    reports: list[tuple[Changes, Rows]] = []
    old, new = make_rows("abc"), make_rows("abd")
    update(tmp_path, old)
    for dry_run in (True, False):
        update(
            tmp_path,
            new,
            dry_run=dry_run,
            report_changes=lambda changes: reports.append((changes, read_rows(tmp_path))),
        )
    assert reports == [(Changes(1, 0, 1, 2), old)] * 2
    assert read_rows(tmp_path) == new


def test_append_keeps_what_the_source_lacks(tmp_path: Path) -> None:
    update(tmp_path, make_rows("abc"))
    summary = update(tmp_path, {"c": ("2", "a cat"), "d": ("1", "a dog")}, replace(UPDATE, append=True))
    assert summary.changes == Changes(new=1, changed=1, missing=0, unchanged=0)
    assert read_rows(tmp_path) == {**make_rows("ab"), "c": ("2", "a cat"), "d": ("1", "a dog")}


def test_mass_removal_needs_permission(tmp_path: Path) -> None:
    cautious = replace(UPDATE, allow_removal=False)
    update(tmp_path, make_rows("abcdefghijklmnopqrst"))
    update(tmp_path, make_rows("abcdefghijklmnopqr"), cautious)
    with pytest.raises(DatasetError, match=r"2 of 18 images are not in the source; .*--append .*--allow-removal"):
        update(tmp_path, make_rows("abcdefghijklmnop"), cautious)
    assert len(read_rows(tmp_path)) == 18


def test_different_shard_size_is_a_clear_error(tmp_path: Path) -> None:
    update(tmp_path, make_rows("abc"))
    with pytest.raises(ConfigError, match="expected the shard size of this manifest, 3, got 4; omit --shard-size"):
        update(tmp_path, make_rows("abc"), replace(UPDATE, shard_size=4))
    assert update(tmp_path, make_rows("abc"), replace(UPDATE, shard_size=None)).already_prepared


def test_version_changes_with_the_file_and_not_with_its_captions(tmp_path: Path) -> None:
    def read_version() -> str:
        version = open_dataset(tmp_path / "manifest").read(0)["version"].to_pylist()[0]
        assert isinstance(version, str)
        return version

    source, config = tmp_path / "a.csv", PrepareConfig()
    (tmp_path / "a.jpg").write_bytes(b"old")
    source.write_text("url,caption\na.jpg,one\n")
    prepare(source, tmp_path / "manifest", config)
    version = read_version()
    source.write_text("url,caption\na.jpg,two\n")
    assert prepare(source, tmp_path / "manifest", config).changes.changed == 1
    assert read_version() == version
    os.utime(tmp_path / "a.jpg", ns=(0, 12345))
    assert prepare(source, tmp_path / "manifest", config).changes.changed == 1
    assert read_version() == f"3-{12345:x}" != version


def test_content_is_verified_where_times_cannot_be_trusted(tmp_path: Path) -> None:
    def write_image(name: str, content: bytes) -> None:
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
        os.utime(tmp_path / "images" / name, ns=(0, 0))

    def run(**options: Any) -> Changes:
        return prepare(tmp_path / "images", tmp_path / "manifest", PrepareConfig(**options)).changes

    for name in ("a.jpg", "b.jpg", "c.jpg"):
        write_image(name, b"old")
    run()
    schema = features_schema(1, "float32")
    features = create_dataset(tmp_path / "features", "features", schema, config={}, shards=1)
    with write_shard(features, 0, 2) as writer:
        hashed = f"{hash_content(b'old'):016x}"
        rows = [
            {"image_id": name, "uri": "", "split": "", "captions": [], "content_hash": hashed, "features": [0.0]}
            for name in ("a.jpg", "b.jpg")
        ]
        writer.write(pa.RecordBatch.from_pylist(rows, schema))
    features.finish()
    verify = {"verify_content": str(tmp_path / "features")}
    assert run(**verify) == Changes(0, 0, 0, 3)
    write_image("a.jpg", b"new")  # with the size and the time of the old image
    assert run() == Changes(0, 0, 0, 3)
    assert run(**verify) == Changes(0, 1, 0, 2)
    versions = open_dataset(tmp_path / "manifest").read(0)["version"].to_pylist()
    assert versions == [f"3-0~{hash_content(b'new'):016x}", "3-0", "3-0"]
    assert run() == run(**verify) == Changes(0, 0, 0, 3)
    write_image("a.jpg", b"old")
    assert run(**verify) == Changes(0, 1, 0, 2)
    with pytest.raises(ConfigError, match="expected a dataset with the column content_hash, got manifest"):
        run(verify_content=str(tmp_path / "manifest"))


NAMES = "abcdefghij"
SOURCES = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.sampled_from("12"), st.sampled_from("xy")), min_size=1)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(SOURCES, st.integers(0, 40)), min_size=1, max_size=5))
def test_killed_update_leaves_the_old_or_the_new_manifest(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[Rows, int]]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    current: Rows = {"a": ("1", "x")}
    update(folder, current)
    for rows, calls in history:
        try:
            with mock.patch("os.fsync"), kill_after(calls):  # the machine does not crash, so syncing only costs time
                update(folder, rows)
        except Killed:
            found = read_rows(folder)
            assert found in (current, rows)
            assert not (folder / "manifest" / JOURNAL_FILE).exists()
            (folder / "manifest" / LOCK_FILE).unlink(missing_ok=True)  # this process goes on, so its lock is not stale
        else:
            found = read_rows(folder)
            assert found == rows
        current = found
    update(folder, rows)
    assert read_rows(folder) == rows
    assert not (folder / "manifest" / UPDATE_FOLDER).exists()
