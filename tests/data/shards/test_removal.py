from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.simulated_kills import WRITES, Killed, kill_after
from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.markers import marker_file, write_marker
from captionlib.data.shards.removal import list_removed, plan_removal
from captionlib.data.shards.schemas import DUPLICATES_SCHEMA, MANIFEST_SCHEMA, features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError, DatasetError, FetchError
from captionlib.storage.folders import Folder
from tests.data.shards.test_damage import flip_bits

SCHEMAS = {"manifest": MANIFEST_SCHEMA, "features": features_schema(1, "float32"), "duplicates": DUPLICATES_SCHEMA}


def write(folder: Path, kind: str, source: ShardedDataset | None = None, shards: int = 2) -> ShardedDataset:
    """Writes shards of three images; in all but manifests, the last image of a shard is a failure."""
    dataset = create_dataset(folder, kind, SCHEMAS[kind], config={"kind": kind}, shards=2, source=source)
    for shard in range(shards):
        marker = source.read_marker(shard) if source else None
        rows = [
            {
                "image_id": f"{shard}{number}",
                "uri": f"{shard}{number}.jpg",
                "split": "",
                "captions": [],
                "features": [number],
                "group": f"{shard}0",
                "kept": number == 0,
                "similarity": 1,
            }
            for number in range(3 if kind == "manifest" else 2)
        ]
        with write_shard(dataset, shard, 3 if kind != "duplicates" else 2, marker.checksum if marker else "") as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
            if kind == "features":
                writer.write_failure(
                    {"image_id": f"{shard}2", "uri": f"{shard}2.jpg"}, FetchError("NotFound", "is missing")
                )
    if shards == 2:
        dataset.finish()
    return dataset


def remove(folder: Path, *ids: str, reason: str = "") -> frozenset[str]:
    plan = plan_removal(open_dataset(folder), ids, reason)
    plan.run()
    return plan.found


def read_ids(folder: Path) -> list[str]:
    """Returns the ids of the rows and, after a space, of the failures."""
    dataset = open_dataset(folder)
    assert dataset.verify() == []
    ids = []
    for shard in sorted(dataset.read_markers()):
        failures = dataset.read_failures(shard)
        ids += dataset.read(shard, ["image_id"])["image_id"].to_pylist()
        ids += [f" {row['image_id']}" for row in ([] if failures is None else failures.to_pylist())]
    return ids


def read_sources(folder: Path) -> list[str]:
    return [marker.input_checksum for _, marker in sorted(open_dataset(folder).read_markers().items())]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    write(tmp_path / "manifest", "manifest")
    return tmp_path / "manifest"


@pytest.fixture
def features(manifest: Path, tmp_path: Path) -> Path:
    write(tmp_path / "features", "features", open_dataset(manifest))
    return tmp_path / "features"


def test_rows_are_removed_from_a_manifest_and_listed(manifest: Path) -> None:
    untouched = (manifest / "part-00000.parquet").stat().st_ino
    assert remove(manifest, "11", "unknown", reason="asked") == {"11"}
    assert read_ids(manifest) == ["00", "01", "02", "10", "12"]
    assert open_dataset(manifest).is_complete()
    assert (manifest / "part-00000.parquet").stat().st_ino == untouched
    removed = list_removed(Folder(manifest))
    assert ["11" in removed, "unknown" in removed, "10" in removed] == [True, True, False]
    assert {reason for reason, _ in removed.reasons.values()} == {"asked"}
    assert not any("11" in key for key in removed.reasons)


def test_list_of_removed_images_grows(manifest: Path) -> None:
    remove(manifest, "11", reason="first")
    remove(manifest, "12", reason="second")
    assert remove(manifest, "nowhere") == frozenset()
    assert [reason for reason, _ in list_removed(Folder(manifest)).reasons.values()] == ["first", "second", ""]


def test_flipped_bits_in_the_list_of_removed_images_are_noticed(manifest: Path) -> None:
    remove(manifest, "11", "12", reason="asked")
    expected, noticed = list_removed(Folder(manifest)), 0
    for bit in flip_bits(manifest / "_removed.json"):
        try:
            assert list_removed(Folder(manifest)) == expected, bit
        except DatasetError as error:
            assert "restore it from a copy" in str(error)  # noqa: PT017 - some bits have no effect
            noticed += 1
    assert noticed > 80


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"images": []}', b'{"images": {"a": []}}', b"\xff"])
def test_damaged_list_of_removed_images_is_an_error(manifest: Path, content: bytes) -> None:
    (manifest / "_removed.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"_removed\.json is damaged .* restore it from a copy"):
        list_removed(Folder(manifest))


def test_rows_and_failures_are_removed_and_shards_stay_current(manifest: Path, features: Path) -> None:
    plans = [plan_removal(open_dataset(folder), ["00", "12", "02"]) for folder in (manifest, features)]
    assert [plan.uris for plan in plans] == [{"00.jpg", "02.jpg", "12.jpg"}] * 2
    for plan in plans:
        plan.run()
    assert read_ids(features) == ["01", "10", "11"]
    assert open_dataset(features).is_complete()
    assert read_sources(features) == [marker.checksum for marker in open_dataset(manifest).read_markers().values()]
    failures = open_dataset(features).read_markers()[1]
    assert (failures.rows, failures.failures) == (2, 0)


def test_shards_that_were_stale_before_stay_stale(manifest: Path, features: Path, tmp_path: Path) -> None:
    rows = pa.Table.from_pylist(
        [{"image_id": "00", "uri": "new.jpg", "split": "", "captions": []}], MANIFEST_SCHEMA
    ).to_batches()
    with write_shard(open_dataset(manifest), 0, 1) as writer:
        writer.write(rows[0])
    remove(features, "01", "11")
    assert read_ids(features) == ["00", " 02", "10", " 12"]
    checksums = [marker.checksum for _, marker in sorted(open_dataset(manifest).read_markers().items())]
    assert [source == checksum for source, checksum in zip(read_sources(features), checksums, strict=True)] == [
        False,
        True,
    ]


def test_incomplete_dataset_stays_incomplete(manifest: Path, tmp_path: Path) -> None:
    write(tmp_path / "features", "features", open_dataset(manifest), shards=1)
    remove(tmp_path / "features", "00")
    assert read_ids(tmp_path / "features") == ["01", " 02"]
    assert open_dataset(tmp_path / "features").pending_shards() == [1]
    assert not open_dataset(tmp_path / "features").is_complete()


def test_features_without_a_source_stay_without_one(tmp_path: Path) -> None:
    write(tmp_path / "features", "features")
    remove(tmp_path / "features", "00")
    assert read_ids(tmp_path / "features") == ["01", " 02", "10", "11", " 12"]
    assert read_sources(tmp_path / "features") == ["", ""]


def test_groups_of_duplicates_with_a_removed_image_are_written_again(tmp_path: Path) -> None:
    write(tmp_path / "duplicates", "duplicates")
    assert remove(tmp_path / "duplicates", "02") == frozenset()
    assert open_dataset(tmp_path / "duplicates").is_complete()
    assert remove(tmp_path / "duplicates", "11") == {"11"}
    assert open_dataset(tmp_path / "duplicates").pending_shards() == [1]
    assert not (tmp_path / "duplicates" / "part-00001.parquet").exists()


def test_images_that_are_not_found_change_nothing(features: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in features.rglob("*")}
    assert remove(features, "nowhere") == frozenset()
    assert {path: path.stat().st_mtime_ns for path in features.rglob("*")} == before


@pytest.mark.parametrize("calls", range(0, 24, 2))
@pytest.mark.parametrize("kind", ["manifest", "features"])
def test_killed_removal_is_finished_by_the_next(manifest: Path, features: Path, kind: str, calls: int) -> None:
    folder = manifest if kind == "manifest" else features
    before = read_ids(folder)
    try:
        with kill_after(calls, WRITES):
            remove(folder, "01", "12")
    except Killed:
        (folder / "_lock").unlink(missing_ok=True)  # its process has ended
    expected = [name for name in before if name.strip() not in ("01", "12")]
    assert read_ids(folder) in (before, expected)
    assert open_dataset(folder).is_complete()
    remove(folder, "01", "12")
    assert read_ids(folder) == expected
    assert open_dataset(folder).is_complete()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("calls", range(8))
def test_files_of_a_killed_command_are_removed(manifest: Path, tmp_path: Path, calls: int, existing: bool) -> None:
    source, folder = open_dataset(manifest), tmp_path / "features"
    if existing:
        write(folder, "features", source)
        dataset = open_dataset(folder)
        dataset.mark_incomplete()
    else:
        dataset = create_dataset(folder, "features", SCHEMAS["features"], config={"kind": "features"}, source=source)
    rows = [{"image_id": name, "uri": name, "split": "", "captions": [], "features": [7]} for name in ("00", "01")]
    with suppress(Killed), kill_after(calls), write_shard(dataset, 0, 3) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
        writer.write_failure({"image_id": "02", "uri": "02"}, FetchError("NotFound", "is missing"))
    (folder / "__sample").mkdir()
    (folder / "__sample" / "part-00000.parquet").write_bytes(b"00 01 02")
    remove(folder, "00", "02")
    tables = [pq.read_table(path) for path in folder.rglob("*.parquet*")]
    assert {"00", "02"}.isdisjoint(image_id for table in tables for image_id in table["image_id"].to_pylist())
    assert {"00", " 02"}.isdisjoint(read_ids(folder))


def test_removal_from_a_dataset_with_a_damaged_marker_is_refused(manifest: Path) -> None:
    open_dataset(manifest).folder.write(marker_file(1), b"damaged")
    for image_id in ("00", "10"):
        with pytest.raises(DamagedShardError, match=r"part-00001.parquet is damaged \(its marker is missing\)"):
            remove(manifest, image_id)
    assert not list_removed(open_dataset(manifest).folder).reasons


def test_time_of_earlier_versions_is_kept(features: Path) -> None:
    dataset = open_dataset(features)
    write_marker(dataset.folder, replace(dataset.read_markers()[1], total_seconds=100.0))
    remove(features, "10")
    marker = dataset.read_markers()[1]
    assert marker.total_seconds == pytest.approx(100 + marker.seconds)
