from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards import writer
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.markers import ShardProgress, encode_progress
from captionlib.data.shards.progress import show_progress
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.stages import ProcessRows, ShardJob
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError, StorageError
from captionlib.storage.folders import Folder


class Copy:
    columns = None

    def open(self) -> AbstractContextManager[ProcessRows]:
        return nullcontext(lambda batches, _fail: ((batch,) for batch in batches))


def write(dataset: ShardedDataset, shard: int, failures: int, source: str = "") -> None:
    with write_shard(dataset, shard, 3, source) as shard_writer:
        rows = [{"image_id": f"{shard}{n}", "uri": "", "split": "", "captions": []} for n in range(3 - failures)]
        shard_writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
        for n in range(failures):
            shard_writer.write_failure({"image_id": f"bad{shard}{n}", "uri": ""}, FetchError("Gone", "not there"))


def job(source: ShardedDataset, output: ShardedDataset) -> ShardJob:
    return ShardJob(source, (output,), Copy())


@pytest.fixture
def datasets(tmp_path: Path) -> tuple[ShardedDataset, ShardedDataset]:
    source, output = (
        create_dataset(tmp_path / name, "manifest", MANIFEST_SCHEMA, config={}, shards=2)
        for name in ("source", "output")
    )
    for shard in range(2):
        write(source, shard, 0)
    return source, output


def test_progress_counts_images_shards_and_failures(
    datasets: tuple[ShardedDataset, ShardedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = datasets
    checksums = [marker.checksum for marker in source.read_markers().values()]
    write(output, 0, 0, checksums[0])
    with show_progress(job(source, output), [1], "label"):
        write(output, 1, 2, checksums[1])
    printed = capsys.readouterr().err
    assert printed.startswith("label: 6/6 images, ")
    assert "2/2 shards, 2 failed" in printed


def test_progress_counts_stale_shards_when_they_are_replaced(
    datasets: tuple[ShardedDataset, ShardedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = datasets
    write(output, 0, 0, "old")
    write(output, 1, 0, "old")
    with show_progress(job(source, output), [0, 1], "label"):
        write(output, 1, 1, "new")
    assert "label: 3/6 images, " in (printed := capsys.readouterr().err)
    assert "1/2 shards, 1 failed" in printed


def test_progress_counts_images_of_shards_in_progress(
    datasets: tuple[ShardedDataset, ShardedDataset], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PROGRESS_SECONDS", -1.0)
    source, output = datasets
    killed = ShardProgress(0, 3, "2026-06-01T12:00:00+00:00", "2026-06-01T12:00:05+00:00")  # of an earlier run
    output.folder.write("__shards/part-00000.progress", encode_progress(killed))
    with pytest.raises(KeyboardInterrupt), write_shard(output, 1, 3) as shard:
        rows = [{"image_id": str(n), "uri": "", "split": "", "captions": []} for n in range(2)]
        with show_progress(job(source, output), [0, 1], "label"):
            shard.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
        assert {shard: each.images for shard, each in output.read_progress(range(2)).items()} == {0: 3, 1: 2}
        raise KeyboardInterrupt
    assert "label: 2/6 images, " in (printed := capsys.readouterr().err)
    assert "0/2 shards, 0 failed" in printed
    write(output, 1, 0)
    assert output.read_progress(range(2)) == {0: killed}
    output.folder.write("__shards/part-00000.progress", b"{}")
    assert output.read_progress(range(2)) == {}
    monkeypatch.setattr(writer, "PROGRESS_SECONDS", 60.0)
    write(output, 0, 0)
    output.finish()
    assert output.read_progress(range(2)) == {}


def test_progress_of_a_shard_needs_no_storage(
    datasets: tuple[ShardedDataset, ShardedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PROGRESS_SECONDS", -1.0)
    _, output = datasets
    write_file = Folder.write

    def fail(folder: Folder, name: str, content: bytes) -> None:
        if name.endswith(".progress"):
            raise StorageError("storage is full")
        write_file(folder, name, content)

    monkeypatch.setattr(Folder, "write", fail)
    write(output, 0, 1)
    assert output.list_written_shards() == {0}


def test_disabled_progress_prints_nothing(
    datasets: tuple[ShardedDataset, ShardedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress(job(*datasets), [0, 1], "label", enabled=False):
        write(datasets[1], 0, 0)
    assert capsys.readouterr().err == ""


def test_progress_ends_if_the_run_fails(
    datasets: tuple[ShardedDataset, ShardedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="died"), show_progress(job(*datasets), [0, 1], "label"):
        write(datasets[1], 0, 0)
        raise RuntimeError("died")
    assert "label: 3/6 images, " in capsys.readouterr().err
