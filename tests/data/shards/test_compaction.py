import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from captionlib.data.shards.compaction import choose_shard_size, plan_compaction
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.inspection import inspect_dataset
from captionlib.data.shards.markers import marker_file, write_marker
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError, DamagedShardError, DatasetError
from captionlib.storage.folders import Folder
from tests.data.shards.test_stages import Row, image, run_once

pytestmark = pytest.mark.usefixtures("without_fsync")

NAMES = [f"{number:02}" for number in range(10)]
OUTPUTS = ("captions", "vectors")


@pytest.fixture
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write many small files, and a killed process, unlike a crashed machine, needs no fsync."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def source(tmp_path: Path) -> ShardedDataset:
    """A manifest of ten images in five shards."""
    return write_manifest(tmp_path / "manifest", [image(name) for name in NAMES], 2)


def write_manifest(folder: Path, rows: list[Row], size: int) -> ShardedDataset:
    shards = -(-len(rows) // size)
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={"shard_size": size}, shards=shards)
    for shard in range(shards):
        batch = pa.RecordBatch.from_pylist(rows[shard * size : (shard + 1) * size], schema=MANIFEST_SCHEMA)
        with write_shard(dataset, shard, batch.num_rows) as writer:
            writer.write(batch)
    dataset.finish()
    return dataset


def compact(tmp_path: Path, size: int | None = 4, *names: str) -> None:
    datasets = [open_dataset(tmp_path / name) for name in names or ("manifest", *OUTPUTS)]
    for plan in plan_compaction(datasets, size):
        plan.run()


def reopen(dataset: ShardedDataset) -> ShardedDataset:
    return open_dataset(dataset.folder.uri).require_complete()


def read_shards(tmp_path: Path, name: str) -> list[list[str]]:
    """Returns the image ids of the rows of each shard."""
    dataset = open_dataset(tmp_path / name).require_complete()
    assert not dataset.verify()
    return [dataset.read(shard)["image_id"].to_pylist() for shard in range(dataset.shards)]


def read_rows(tmp_path: Path, name: str) -> list[Row]:
    dataset = open_dataset(tmp_path / name).require_complete()
    return [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]


def divide(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_all_datasets_get_the_same_shards_and_nothing_is_processed_again(
    source: ShardedDataset, tmp_path: Path, size: int
) -> None:
    run_once(source, tmp_path)
    before = {name: read_rows(tmp_path, name) for name in ("manifest", *OUTPUTS)}
    compact(tmp_path, size)
    for name, rows in before.items():
        assert read_shards(tmp_path, name) == divide(NAMES, size)
        assert read_rows(tmp_path, name) == rows
        assert inspect_dataset(tmp_path / name).stale == 0
    assert open_dataset(tmp_path / "manifest").config == {"shard_size": size}
    assert run_once(reopen(source), tmp_path) == []


def test_failures_move_with_their_rows(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path, broken="01 02 09")
    compact(tmp_path)
    captions = open_dataset(tmp_path / "captions").require_complete()
    failures = [table["image_id"].to_pylist() if (table := captions.read_failures(shard)) else [] for shard in range(3)]
    assert failures == [["01", "02"], [], ["09"]]
    assert read_shards(tmp_path, "captions") == [["00", "03"], ["04", "05", "06", "07"], ["08"]]
    assert captions.compute_totals().reasons == {"Gone": 3}
    assert run_once(reopen(source), tmp_path, broken="01 02 09") == []


def test_only_what_was_pending_before_is_pending_afterwards(tmp_path: Path) -> None:
    rows = [image(name) for name in NAMES]
    run_once(write_manifest(tmp_path / "manifest", rows, 2), tmp_path)
    rows[3] = image("03", version="2")
    rows[5] = image("05", captions=["a new reference"], split="val")
    source = write_manifest(tmp_path / "manifest", [*rows[:7], *rows[8:], image("10")], 2)
    compact(tmp_path)
    assert read_shards(tmp_path, "captions")[0] == ["00", "01", "02"]
    assert run_once(reopen(source), tmp_path) == ["03", "10"]
    assert [row["split"] for row in read_rows(tmp_path, "captions")] == [*[""] * 5, "val", *[""] * 4]


def test_incomplete_output_keeps_its_rows(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    for name in OUTPUTS:
        open_dataset(tmp_path / name).remove_shard(1)
    compact(tmp_path)
    assert not open_dataset(tmp_path / "captions").is_complete()
    assert run_once(reopen(source), tmp_path) == ["02", "03"]
    assert read_shards(tmp_path, "captions") == divide(NAMES, 4)


def test_second_compaction_writes_nothing(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    compact(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    compact(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_stage_refuses_shards_from_before_the_compaction(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    compact(tmp_path, 4, "manifest")
    with pytest.raises(DatasetError, match=r"run `captionlib compact .*manifest .*captions` to move"):
        run_once(reopen(source), tmp_path)
    compact(tmp_path, 4, *OUTPUTS)
    assert run_once(reopen(source), tmp_path) == []


@pytest.mark.parametrize("offset", range(4))
def test_compaction_that_was_killed_anywhere_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    for killed_at in itertools.count(offset, 4):
        shutil.rmtree(tmp_path)
        run_once(write_manifest(tmp_path / "manifest", [image(name) for name in NAMES[:4]], 2), tmp_path, broken="02")
        with monkeypatch.context() as patch:
            kill_after(patch, killed_at)
            try:
                compact(tmp_path, 3)
                break
            except KeyboardInterrupt:
                pass
        compact(tmp_path, 3)
        assert read_shards(tmp_path, "manifest") == divide(NAMES[:4], 3), killed_at
        assert read_shards(tmp_path, "captions") == read_shards(tmp_path, "vectors") == [["00", "01"], ["03"]], (
            killed_at
        )
        assert run_once(open_dataset(tmp_path / "manifest"), tmp_path, broken="02") == [], killed_at
    assert killed_at > 20


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupts the process before a change of the file system, after `steps` changes."""
    left = itertools.count(steps, -1)

    def interrupt(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any) -> Any:
            if next(left) <= 0:
                raise KeyboardInterrupt
            return change(*arguments)

        return changed

    for name in ("_publish_local", "remove", "remove_file"):
        monkeypatch.setattr(Folder, name, interrupt(getattr(Folder, name)))


def test_dataset_without_its_source_is_refused_before_anything_changes(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    source.remove_marker(3)
    with pytest.raises(DatasetError, match="manifest is not complete"):
        compact(tmp_path, 4, *OUTPUTS)


@pytest.mark.parametrize("shard", [0, 4])
def test_manifest_with_a_damaged_marker_is_refused_and_loses_nothing(
    source: ShardedDataset, tmp_path: Path, shard: int
) -> None:
    source.folder.write(marker_file(shard), b"damaged")
    files = {path: path.read_bytes() for path in (tmp_path / "manifest").rglob("part-*")}
    with pytest.raises(DamagedShardError, match=rf"part-0000{shard}.parquet is damaged \(its marker is missing\)"):
        compact(tmp_path, 4, "manifest")
    assert {path: path.read_bytes() for path in (tmp_path / "manifest").rglob("part-*")} == files


def test_duplicates_are_refused(source: ShardedDataset, tmp_path: Path) -> None:
    create_dataset(tmp_path / "duplicates", "duplicates", MANIFEST_SCHEMA, config={}, shards=1, source=source)
    with pytest.raises(ConfigError, match=r"expected a dataset of kind .*, got duplicates"):
        compact(tmp_path, 4, "manifest", "duplicates")
    assert open_dataset(tmp_path / "manifest").shards == 5


@pytest.mark.parametrize(
    ("images", "size"),
    [(0, 1000), (1, 1000), (8_000, 1000), (100_000, 1000), (100_001, 2000), (1_000_000, 4000), (10_000_000, 10_000)],
)
def test_default_shard_size_grows_with_the_number_of_images(images: int, size: int) -> None:
    assert choose_shard_size(images) == size


def test_time_of_earlier_versions_is_distributed_over_the_new_shards(source: ShardedDataset, tmp_path: Path) -> None:
    run_once(source, tmp_path)
    captions = open_dataset(tmp_path / "captions")
    for marker in captions.read_markers().values():
        write_marker(captions.folder, replace(marker, total_seconds=100.0))
    compact(tmp_path)
    markers = reopen(captions).read_markers()
    earlier = [markers[shard].total_seconds - markers[shard].seconds for shard in range(3)]
    assert earlier == pytest.approx([200, 200, 100], abs=0.01)
