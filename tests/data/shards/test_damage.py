import errno
import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captionlib.data.shards import dataset as dataset_module
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import Marker, to_json_with_checksum, write_marker
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema, embeddings_schema, features_schema
from captionlib.data.shards.verification import VerifiedFile
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError, DatasetError, FetchError, StorageError
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

SCHEMAS = {
    "manifest": MANIFEST_SCHEMA,
    "features": features_schema(3, "float16"),
    "captions": captions_schema(),
    "embeddings": embeddings_schema(3),
}


def write_rows(dataset: ShardedDataset, shard: int, count: int = 20) -> Marker:
    rows = [
        {
            "image_id": f"{shard}-{number}",
            "uri": f"images/{number}.jpg",
            "version": f"{7919 * number}",
            "split": "train",
            "captions": [f"a dog {number}"],
            "features": [number, 1, 2],
            "caption": "a cat",
            "log_prob": -number,
            "tokens": 3,
            "candidates": [{"caption": "a cat", "log_prob": -number}],
            "embedding": [number, 0, 1],
        }
        for number in range(count)
    ]
    with write_shard(dataset, shard, count + 1) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
        writer.write_failure({"image_id": "bad", "uri": "bad.jpg"}, FetchError("HTTP 404", "not found"))
    return writer.marker


def create(folder: Path, kind: str = "manifest") -> ShardedDataset:
    dataset = create_dataset(folder, kind, SCHEMAS[kind], config={"recipe": 1}, shards=2)
    for shard in range(2):
        write_rows(dataset, shard)
    dataset.finish()
    return dataset


def flip_bits(path: Path, count: int = 100) -> Iterator[int]:
    """Flips one bit of a file at a time and yields its number. The sample includes the first and the last bits."""
    content = path.read_bytes()
    bits = len(content) * 8
    for bit in [0, bits - 1, *random.Random(0).sample(range(bits), count - 2)]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield bit
    path.write_bytes(content)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_flipped_bits_in_data_files_are_noticed(tmp_path: Path, kind: str) -> None:
    dataset = create(tmp_path, kind)
    expected = dataset.read(0)
    for _ in flip_bits(tmp_path / "part-00000.parquet"):
        with pytest.raises(DamagedShardError, match=r"part-00000\.parquet is damaged .*run the command that writes"):
            dataset.read(0)
    assert dataset.read(0).equals(expected)


def test_flipped_bits_in_failures_are_noticed(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    for _ in flip_bits(tmp_path / "__failures" / "part-00001.parquet"):
        with pytest.raises(DamagedShardError, match=r"__failures/part-00001\.parquet is damaged"):
            dataset.read_failures(1)


def test_flipped_bits_in_failures_that_are_being_removed_are_noticed(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    marker = dataset.read_marker(0)
    assert marker is not None
    write_marker(dataset.folder, replace(marker, failures=0, failures_checksum="", previous=marker))
    assert dataset.read_failures(0) is not None
    for _ in flip_bits(tmp_path / "__failures" / "part-00000.parquet", 10):
        with pytest.raises(DamagedShardError, match=r"__failures/part-00000\.parquet is damaged"):
            dataset.read_failures(0)


def test_markers_with_flipped_bits_do_not_count(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    expected = dataset.read_marker(0)
    for bit in flip_bits(tmp_path / "__shards" / "part-00000.json"):
        assert dataset.read_marker(0) in (None, expected), (
            bit
        )  # the bit may be in the checksum's name or in white space
        assert dataset.pending_shards() in ([], [0])


def test_totals_with_flipped_bits_do_not_count(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    expected = dataset.read_totals()
    for bit in flip_bits(tmp_path / "_SUCCESS"):
        assert dataset.read_totals() in (None, expected), bit


def test_flipped_bits_in_the_description_are_noticed(tmp_path: Path) -> None:
    expected = create(tmp_path)
    noticed = 0
    for bit in flip_bits(tmp_path / "_dataset.json"):
        try:
            assert open_dataset(tmp_path) == expected, bit
        except DatasetError:
            noticed += 1
    assert noticed > 90


GARBAGE = {
    "empty": b"",
    "half": b'{"shard": 0, ',
    "null": b"null",
    "list": b"[1, 2]",
    "text": b'"part"',
    "binary": b"\xff\xfe\x00\x80",
    "nested": b"[" * 100_000,
    "other fields": b'{"hello": 1}',
    "other types": to_json_with_checksum(dict.fromkeys(Marker.__dataclass_fields__, "x")),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=list(GARBAGE))
def test_shards_with_garbage_in_their_marker_are_written_again(tmp_path: Path, content: bytes) -> None:
    dataset = create(tmp_path)
    (tmp_path / "__shards" / "part-00000.json").write_bytes(content)
    assert dataset.read_marker(0) is None
    assert dataset.pending_shards() == [0]
    with pytest.raises(DamagedShardError, match="its marker is missing"):
        dataset.read(0)
    with pytest.raises(DatasetError, match=r"finished shards, got 1 \(the first missing shard is part-00000\)"):
        dataset.finish()
    write_rows(dataset, 0)
    assert dataset.finish().shards == 2
    assert dataset.read(0).num_rows == 20


@pytest.mark.parametrize("content", GARBAGE.values(), ids=list(GARBAGE))
def test_dataset_with_garbage_in_its_totals_is_incomplete(tmp_path: Path, content: bytes) -> None:
    dataset = create(tmp_path)
    (tmp_path / "_SUCCESS").write_bytes(content)
    with pytest.raises(
        DatasetError, match=r"is not complete: its 2 shards are finished, but|is not complete: 2 of 42 images"
    ):
        open_dataset(tmp_path).require_complete()
    assert dataset.finish() == dataset.read_totals()
    assert open_dataset(tmp_path).is_complete()


@pytest.mark.parametrize("content", GARBAGE.values(), ids=list(GARBAGE))
def test_garbage_in_the_description_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    create(tmp_path)
    (tmp_path / "_dataset.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"_dataset\.json is damaged .*--overwrite"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"_dataset\.json is damaged"):
        create_dataset(tmp_path, "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    replaced = create_dataset(tmp_path, "manifest", MANIFEST_SCHEMA, config={}, shards=1, overwrite=True)
    assert replaced.pending_shards() == [0]


@pytest.mark.parametrize("name", ["schema_version", "arrow_schema", "config", "kind"])
def test_description_without_a_field_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    create(tmp_path)
    description = json.loads((tmp_path / "_dataset.json").read_text())
    del description[name], description["crc32"]
    (tmp_path / "_dataset.json").write_text(json.dumps(description))
    with pytest.raises(DatasetError, match=rf"_dataset\.json is damaged \(KeyError\('{name}'\)\)"):
        open_dataset(tmp_path)


def copy_marker(tmp_path: Path, **changes: Any) -> None:
    path = tmp_path / "__shards" / "part-00000.json"
    record = json.loads(path.read_text())
    del record["crc32"]
    path.write_bytes(to_json_with_checksum({**record, **changes}))


def test_markers_of_another_dataset_or_shard_do_not_count(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    copy_marker(tmp_path, fingerprint="another")
    assert dataset.pending_shards() == [0]
    copy_marker(tmp_path, fingerprint=dataset.fingerprint)
    assert dataset.pending_shards() == []
    copy_marker(tmp_path, shard=1)
    assert dataset.pending_shards() == [0]
    assert dataset.read_marker(0) is None


def test_markers_without_a_data_file_do_not_count(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    (tmp_path / "part-00001.parquet").unlink()
    assert dataset.read_marker(1) is None
    assert dataset.pending_shards() == [1]
    assert dataset.verify() == ["part-00001.parquet: missing"]
    with pytest.raises(DamagedShardError, match=r"part-00001\.parquet is damaged \(missing\)"):
        dataset.read(1)


def test_other_files_in_the_folder_are_ignored(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    for name in ("part-00004 (copy)", "part-1", "part-x", "part-00000.json", "part-٣٣٣٣٣", "part-00002", ".DS_Store"):
        (tmp_path / "__shards" / f"{name}.json").write_text("{}")
        (tmp_path / f"{name}.parquet").write_text("")
    assert dataset.list_written_shards() == {0, 1}
    assert dataset.read_markers([1, 2]).keys() == {1}
    assert dataset.compute_totals() == dataset.read_totals()


@pytest.mark.parametrize("keep", [0, 1, 100, 500])
def test_truncated_data_files_are_damaged(tmp_path: Path, keep: int) -> None:
    dataset = create(tmp_path)
    path = tmp_path / "part-00000.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedShardError, match=rf"part-00000\.parquet is damaged .expected {size} bytes, got {keep}"):
        dataset.read(0)


def test_readers_of_one_column_do_not_read_the_others(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path, "features", features_schema(1024, "float32"), config={}, shards=1)
    generator = random.Random(0)
    rows = [
        {"image_id": f"{number}", "uri": "", "split": "", "captions": [], "features": [generator.random()] * 1024}
        for number in range(1000)
    ]
    for row in rows:
        row["features"] = [generator.random() for _ in range(1024)]
    with write_shard(dataset, 0, 1000) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
    path = tmp_path / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    assert len(content) > 2 << 20
    content[1 << 20] ^= 1
    path.write_bytes(content)
    assert dataset.read(0, ["image_id"])["image_id"].to_pylist() == [row["image_id"] for row in rows]
    with pytest.raises(DamagedShardError, match=r"bytes .* differ from their checksums"):
        dataset.read(0, ["features"])


def test_readers_accept_both_versions_while_a_shard_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = create(tmp_path)
    publish, read = Folder._publish_local, []

    def read_after(folder: Folder, path: Path, target: Path) -> None:
        publish(folder, path, target)
        read.append(dataset.read(0).num_rows)

    monkeypatch.setattr(Folder, "_publish_local", read_after)
    dataset.mark_incomplete()
    write_rows(dataset, 0, 30)
    assert read == [20, 30, 30, 30]  # after the marker of both versions, the data, the failures and the new marker
    assert dataset.read_marker(0) is not None


def call_after_first_marker(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Calls `action` once, after the first marker has been read."""
    read_marker_even_if_unfinished, calls = ShardedDataset.read_marker_even_if_unfinished, []

    def read_and_call(self: ShardedDataset, shard: int) -> Marker | None:
        marker = read_marker_even_if_unfinished(self, shard)
        calls.append(shard)
        if len(calls) == 1:
            action()
        return marker

    monkeypatch.setattr(ShardedDataset, "read_marker_even_if_unfinished", read_and_call)


def test_reader_that_meets_a_new_version_reads_its_marker_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = create(tmp_path)
    call_after_first_marker(monkeypatch, lambda: write_rows(dataset, 0, 30))
    assert dataset.read(0).num_rows == 30


def write_failure(dataset: ShardedDataset, name: str) -> None:
    """Replaces a shard by a single failure, or by no image at all."""
    with write_shard(dataset, 0, 1 if name else 0) as writer:
        if name:
            writer.write_failure({"image_id": name, "uri": ""}, FetchError("HTTP 404", "not found"))


@pytest.mark.parametrize(("name", "expected"), [("other", ["other"]), ("", None)])
def test_reader_that_meets_new_failures_reads_their_marker_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str] | None
) -> None:
    dataset = create(tmp_path)
    call_after_first_marker(monkeypatch, lambda: write_failure(dataset, name))
    failures = dataset.read_failures(0)
    assert (None if failures is None else failures["image_id"].to_pylist()) == expected


@pytest.mark.parametrize("names", [("bad", ""), ("", "bad")])
def test_readers_of_failures_accept_both_versions_while_a_shard_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    dataset = create(tmp_path)
    write_failure(dataset, names[0])
    found: list[list[str] | None] = []

    def read_after(original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            original(*arguments)
            failures = dataset.read_failures(0)
            found.append(None if failures is None else failures["image_id"].to_pylist())

        return call

    for name in ("_publish_local", "remove_file"):
        monkeypatch.setattr(Folder, name, read_after(getattr(Folder, name)))
    write_failure(dataset, names[1])
    steps = [[names[0]], [names[0]], [names[1]], [names[1]]]  # marker of both versions, data, failures, new marker
    assert found == [None if step == [""] else step for step in steps]


def test_file_that_is_replaced_while_the_marker_describes_both_versions_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, other = create(tmp_path / "old"), create(tmp_path / "new")
    new = write_rows(other, 0, 30)
    write_marker(dataset.folder, replace(new, previous=dataset.read_marker(0)))
    opened = []

    class ReplacedFile(VerifiedFile):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.append(self)
            if len(opened) == 1:
                (tmp_path / "new" / "part-00000.parquet").replace(tmp_path / "old" / "part-00000.parquet")

    monkeypatch.setattr(dataset_module, "VerifiedFile", ReplacedFile)
    assert dataset.read(0).num_rows == 30
    for _ in flip_bits(tmp_path / "old" / "part-00000.parquet", 3):
        with pytest.raises(DamagedShardError):
            dataset.read(0)


def test_readers_during_many_rewrites_see_whole_versions(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    found, stop = set[int](), threading.Event()
    errors: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                found.add(dataset.read(0).num_rows)
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(10):
        write_rows(dataset, 0, 20 + number % 2 * 10)
    stop.set()
    thread.join()
    assert errors == []
    assert found <= {20, 30}


def test_finishing_a_run_keeps_the_temporary_files_of_another(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    crashed = tmp_path / TEMPORARY_FOLDER / "part-00000.parquet.crashed"
    with write_shard(dataset, 0, 0):
        crashed.write_bytes(b"half")
        dataset.mark_incomplete()
        dataset.finish()
        assert not crashed.exists()
    assert dataset.read(0).num_rows == 0
    dataset.mark_incomplete()
    dataset.finish()
    assert not (tmp_path / TEMPORARY_FOLDER).exists()


def test_two_equal_runs_at_once_succeed(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def run() -> None:
        try:
            create(tmp_path / "data")
        except Exception as error:
            errors.append(error)

    for _ in range(10):
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        dataset = open_dataset(tmp_path / "data").require_complete()
        assert dataset.verify() == []
        dataset.remove_marker(0)


def test_dataset_that_another_run_creates_meanwhile_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run creates the dataset after this run has found no description."""
    listed = Folder.list

    def create_and_list(folder: Folder, subfolder: str = "") -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "list", listed)
            create(tmp_path)
        return listed(folder, subfolder)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "list", create_and_list)
        dataset = create_dataset(tmp_path, "manifest", MANIFEST_SCHEMA, config={"recipe": 1}, shards=2)
    assert dataset == open_dataset(tmp_path)
    assert dataset.pending_shards() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("step", ["write", "publish"])
def test_full_disk_is_one_error_and_the_run_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    dataset = create(tmp_path)
    dataset.remove_marker(0)

    def fail(*_: object) -> None:
        raise OSError(code, "Detail: disk")

    target: tuple[Any, str] = (
        (pa.parquet.ParquetWriter, "write_table") if step == "write" else (Folder, "_publish_local")
    )
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"part-00000\.parquet cannot be accessed"):
        patch.setattr(*target, fail)
        write_rows(dataset, 0)
    assert dataset.pending_shards() == [0]
    assert Folder(tmp_path).list(TEMPORARY_FOLDER) == []
    write_rows(dataset, 0)
    assert dataset.finish().shards == 2


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[str], ShardedDataset]:
    return lambda kind: open_dataset(Path(__file__).parent / "stored" / kind, kind).require_complete()


def test_datasets_of_the_first_release_can_be_read(stored: Callable[[str], ShardedDataset]) -> None:
    """The stored datasets lack the columns version, width, height and content_hash, and their markers lack blocks."""
    features, captions = stored("features"), stored("captions")
    assert features.schema.equals(features_schema(2, "float16"))
    assert captions.schema.equals(captions_schema())
    assert features.manifest_id == "a manifest"
    assert features.read(1).to_pylist()[1] == {
        "image_id": "11",
        "uri": "images/11.jpg",
        "version": None,
        "split": "train",
        "captions": ["a dog"],
        "width": None,
        "height": None,
        "content_hash": None,
        "features": [1, 1],
    }
    assert captions.read(0, ["caption", "version"]).to_pylist() == [{"version": None, "caption": "a dog"}] * 2
    failures = captions.read_failures(1)
    assert failures is not None
    assert failures.to_pylist()[0]["version"] is None
    assert features.verify() == captions.verify() == []
    assert stored("manifest").schema.equals(MANIFEST_SCHEMA)
    assert stored("embeddings").read(0, ["embedding"])["embedding"].to_pylist() == [[1, 0]] * 2
    assert features.compute_content_checksum() != captions.compute_content_checksum()


def test_dataset_that_lacks_a_nullable_column_is_resumed(tmp_path: Path) -> None:
    older = pa.schema([field for field in captions_schema() if field.name != "version"])
    dataset = create_dataset(tmp_path, "captions", older, config={}, shards=2)
    write_rows(dataset, 0)
    resumed = create_dataset(tmp_path, "captions", captions_schema(), config={}, shards=2)
    assert resumed.pending_shards() == [1]
    write_rows(resumed, 1)
    resumed.finish()
    opened = open_dataset(tmp_path).require_complete()
    versions = [opened.read(shard, ["version"])["version"].to_pylist()[1] for shard in range(2)]
    assert versions == [None, "7919"]


def test_datasets_of_another_schema_version_are_refused(tmp_path: Path) -> None:
    create(tmp_path)
    description = json.loads((tmp_path / "_dataset.json").read_text())
    del description["crc32"]
    (tmp_path / "_dataset.json").write_bytes(to_json_with_checksum({**description, "schema_version": 2}))
    with pytest.raises(DatasetError, match="expected version 1 of the schema of manifest, got 2"):
        open_dataset(tmp_path)


def test_missing_marker_is_an_error_for_commands_that_need_all_shards(tmp_path: Path) -> None:
    dataset = create(tmp_path)
    (tmp_path / "__shards" / "part-00001.json").unlink()
    with pytest.raises(DamagedShardError, match=r"part-00001\.parquet is damaged \(its marker is missing\)"):
        dataset.require_all_markers()
    dataset.mark_incomplete()
    with pytest.raises(DatasetError, match="is not complete: expected 2 finished shards, got 1"):
        dataset.require_all_markers()
