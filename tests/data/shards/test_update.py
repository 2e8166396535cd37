import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.simulated_kills import WRITES, Killed
from captionlib.data.shards import update as update_module
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import JOURNAL_FILE, UPDATE_FOLDER, Totals, write_marker
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.update import drop_uncommitted_updates, update_shards
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError, FetchError
from captionlib.storage.folders import Folder
from tests.data.shards.test_damage import GARBAGE, flip_bits


def write(dataset: ShardedDataset, shard: int, rows: Sequence[str], failed: Sequence[str] = ()) -> None:
    values = [{"image_id": name, "uri": "", "split": "", "captions": []} for name in rows]
    with write_shard(dataset, shard, len(rows) + len(failed)) as writer:
        writer.write(pa.RecordBatch.from_pylist(values, schema=MANIFEST_SCHEMA))
        for name in failed:
            writer.write_failure({"image_id": name, "uri": ""}, FetchError("NotFound", "is missing"))


def read(folder: Path) -> list[list[str]]:
    """Returns the ids of the rows and, after a space, of the failures of each shard."""
    dataset = open_dataset(folder).require_complete()
    assert dataset.verify() == []
    shards = []
    for shard in range(dataset.shards):
        failures = dataset.read_failures(shard)
        failed = [] if failures is None else failures["image_id"].to_pylist()
        shards.append([*dataset.read(shard)["image_id"].to_pylist(), *(f" {name}" for name in failed)])
    return shards


OLD = [["a", "b", " c"], ["d"], ["e", " f"]]
NEW = [["a", "x"], ["d"], ["e", " y"], ["z"]]


@pytest.fixture
def dataset(tmp_path: Path) -> ShardedDataset:
    dataset = create_dataset(tmp_path, "manifest", MANIFEST_SCHEMA, config={}, shards=3)
    write(dataset, 0, ["a", "b"], ["c"])
    write(dataset, 1, ["d"])
    write(dataset, 2, ["e"], ["f"])
    dataset.finish()
    return dataset


def update(dataset: ShardedDataset) -> None:
    with update_shards(dataset, 4) as staged:
        write(staged, 0, ["a", "x"])
        write(staged, 2, ["e"], ["y"])
        write(staged, 3, ["z"])


def test_staged_shards_replace_the_old_ones(dataset: ShardedDataset, tmp_path: Path) -> None:
    inode = (tmp_path / "part-00001.parquet").stat().st_ino
    update(dataset)
    assert read(tmp_path) == NEW
    assert (tmp_path / "part-00001.parquet").stat().st_ino == inode
    assert not {JOURNAL_FILE, UPDATE_FOLDER} & set(dataset.folder.list())


def test_update_can_remove_shards(dataset: ShardedDataset, tmp_path: Path) -> None:
    with update_shards(dataset, 1) as staged:
        write(staged, 0, ["a", "d"])
    assert read(tmp_path) == [["a", "d"]]
    assert sorted(path.name for path in tmp_path.glob("part-*")) == ["part-00000.parquet"]
    assert dataset.folder.list("__failures") == []


def test_nothing_changes_if_the_block_raises(dataset: ShardedDataset, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="died"),
        update_shards(dataset, 3) as staged,
    ):
        write(staged, 0, ["x"])
        raise RuntimeError("died")
    assert read(tmp_path) == OLD
    assert dataset.folder.list(UPDATE_FOLDER) == []


@pytest.mark.parametrize("lost", ["__shards/part-00002.json", "__shards", "part-00000.parquet"])
def test_staged_files_that_are_removed_meanwhile_are_an_error(
    dataset: ShardedDataset, tmp_path: Path, lost: str
) -> None:
    with pytest.raises(DatasetError, match="was changed or removed"), update_shards(dataset, 3) as staged:
        write(staged, 0, ["a", "x"])
        write(staged, 2, ["e"], ["y"])
        path = Path(staged.folder.path(lost))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert read(tmp_path) == OLD


def test_readers_see_the_old_rows_until_the_commit(dataset: ShardedDataset, tmp_path: Path) -> None:
    with update_shards(dataset, 3) as staged:
        write(staged, 0, ["x"])
        assert read(tmp_path) == OLD
    assert read(tmp_path) == [["x"], *OLD[1:]]


def test_update_of_a_dataset_that_changes_meanwhile_is_refused(dataset: ShardedDataset, tmp_path: Path) -> None:
    refused = pytest.raises(DatasetError, match="another command updated this dataset at the same time; run this one")
    with refused, update_shards(dataset, 3) as staged:
        write(staged, 0, ["x"])
        update(dataset)
    assert read(tmp_path) == NEW
    with refused, update_shards(open_dataset(tmp_path), 4):
        write(dataset, 1, ["other"])
        dataset.mark_incomplete()
    assert JOURNAL_FILE not in dataset.folder.list()
    assert dataset.folder.list(UPDATE_FOLDER) == []


@pytest.mark.parametrize("complete", [True, False])
def test_dataset_stays_as_complete_as_it_was(dataset: ShardedDataset, complete: bool) -> None:
    if not complete:
        dataset.remove_marker(1)
    with update_shards(dataset, 3) as staged:
        write(staged, 0, ["x"])
    assert dataset.is_complete() == complete
    assert sorted(dataset.read_markers()) == ([0, 1, 2] if complete else [0, 2])


def test_staged_shards_of_an_interrupted_update_are_dropped(dataset: ShardedDataset, tmp_path: Path) -> None:
    (tmp_path / UPDATE_FOLDER / "interrupted").mkdir(parents=True)
    drop_uncommitted_updates(dataset.folder)
    assert not {UPDATE_FOLDER} & set(dataset.folder.list())
    (tmp_path / UPDATE_FOLDER / "interrupted").mkdir(parents=True)
    update(dataset)
    assert not (tmp_path / UPDATE_FOLDER).exists()
    assert read(tmp_path) == NEW


def kill_after_commit(dataset: ShardedDataset, patch: pytest.MonkeyPatch, calls: int) -> None:
    """Kills an update after the journal and so many storage calls."""
    left: int | None = None

    def wrap(name: str) -> None:
        original = getattr(Folder, name)

        def call(folder: Folder, *arguments: object) -> object:
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    raise Killed
            result = original(folder, *arguments)
            if left is None and name == "_publish_local" and Path(str(arguments[1])).name == JOURNAL_FILE:
                left = calls
            return result

        patch.setattr(Folder, name, call)

    for name in WRITES:
        wrap(name)
    update(dataset)


@pytest.mark.parametrize("calls", range(24))  # more than there are
def test_committed_update_is_completed_when_the_dataset_is_opened(
    dataset: ShardedDataset, tmp_path: Path, calls: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            kill_after_commit(dataset, patch, calls)
            killed = False
        except Killed:
            killed = True
    assert killed or calls > 12
    if killed:
        unopened = open_dataset(tmp_path, complete_update=False)
        assert unopened.read(1)["image_id"].to_pylist() == ["d"]
        assert set(unopened.read(0)["image_id"].to_pylist()) in ({"a", "b"}, {"a", "x"})
        failures = unopened.read_failures(2)
        assert failures is not None
        assert failures["image_id"].to_pylist() in (["f"], ["y"])
    assert read(tmp_path) == NEW
    drop_uncommitted_updates(dataset.folder)  # if it was killed after it had removed the journal
    assert not {JOURNAL_FILE, UPDATE_FOLDER} & set(dataset.folder.list())


@pytest.mark.parametrize("content", GARBAGE.values(), ids=list(GARBAGE))
def test_damaged_journal_is_an_error_that_names_the_file(
    dataset: ShardedDataset, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / JOURNAL_FILE).write_bytes(content)
    with pytest.raises(DatasetError, match=r"_update\.json is damaged .*--overwrite"):
        open_dataset(tmp_path)


def test_flipped_bits_in_the_journal_are_noticed(dataset: ShardedDataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after_commit(dataset, patch, 0)
    noticed = 0
    for bit in flip_bits(tmp_path / JOURNAL_FILE, 40):
        try:
            open_dataset(tmp_path)
        except DatasetError as error:
            assert "_update.json is damaged" in str(error)  # noqa: PT017 - a bit in white space has no effect
            noticed += 1
        else:
            assert read(tmp_path) == NEW, bit
            break
    assert noticed > 0
    (tmp_path / JOURNAL_FILE).unlink(missing_ok=True)


def test_journal_without_its_shards_is_dropped(dataset: ShardedDataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after_commit(dataset, patch, 0)
    dataset.folder.remove(UPDATE_FOLDER)
    with pytest.raises(DatasetError, match="expected the new version of part-00000, got no file"):
        open_dataset(tmp_path)
    assert read(tmp_path) == OLD


def test_staged_shards_that_vanish_while_they_are_moved_are_an_error(
    dataset: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_shard = update_module._move_shard

    def remove_and_move(folder: Folder, *arguments: str) -> None:
        folder.remove(UPDATE_FOLDER)
        move_shard(folder, *arguments)

    with monkeypatch.context() as patch, pytest.raises(DatasetError, match="the new version of part-00000, got no"):
        patch.setattr(update_module, "_move_shard", remove_and_move)
        update(dataset)
    with pytest.raises(DatasetError, match="expected the new version of part-00000, got no file"):
        open_dataset(tmp_path)
    assert read(tmp_path) == OLD


def test_journal_without_some_of_its_shards_is_kept(dataset: ShardedDataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after_commit(dataset, patch, 6)
    dataset.folder.remove(UPDATE_FOLDER)
    for _ in range(2):
        with pytest.raises(DatasetError, match="expected the new version of part-00003, got no file"):
            open_dataset(tmp_path)


def test_slow_completion_of_an_update_keeps_the_journal_of_the_next(
    dataset: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after_commit(dataset, patch, 0)
    finish = ShardedDataset.finish

    def commit_next_and_finish(current: ShardedDataset, *arguments: float, **options: float) -> Totals:
        monkeypatch.undo()
        opened = open_dataset(tmp_path)  # completes the first update
        monkeypatch.setattr(update_module, "complete_update", lambda folder: None)
        with update_shards(opened, 4) as staged:
            write(staged, 1, ["next"])
        monkeypatch.undo()
        return finish(current, *arguments, **options)

    monkeypatch.setattr(ShardedDataset, "finish", commit_next_and_finish)
    update_module.complete_update(dataset.folder)
    assert read(tmp_path) == [NEW[0], ["next"], *NEW[2:]]


def test_update_is_completed_while_a_job_replaces_a_shard(dataset: ShardedDataset, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after_commit(dataset, patch, 0)
    marker = dataset.read_marker(1)
    assert marker is not None
    write_marker(dataset.folder, replace(marker, previous=marker))
    opened = open_dataset(tmp_path)
    assert JOURNAL_FILE not in opened.folder.list()
    assert not opened.is_complete()
    assert opened.pending_shards() == [1]
    write(opened, 1, ["d"])
    opened.finish()
    assert read(tmp_path) == NEW
