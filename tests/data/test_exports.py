import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from captionlib.data.exports import ExportFormat, ExportSummary, export_images
from captionlib.data.ingestion.prepare import prepare
from captionlib.data.selection import select_images
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import DUPLICATES_SCHEMA, MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError, DatasetError, FingerprintError, LockError
from captionlib.storage.folders import Folder
from captionlib.storage.lock import lock_folder


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five images in two shards; d is missing, and e is in the split val."""
    for name in "abce":
        Image.new("RGB", (2, 2), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    folder = tmp_path / "manifest"
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={}, shards=2)
    for shard, names in enumerate(("abc", "de")):
        rows = [
            {
                "image_id": f"x/{name}.png",
                "uri": str(tmp_path / f"{name}.png"),
                "split": "val" if name == "e" else "train",
                "captions": [f"caption {name}", "another"],
            }
            for name in names
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, MANIFEST_SCHEMA))
    dataset.finish()
    return folder


def write_duplicates(folder: Path) -> Path:
    rows = [{"image_id": f"x/{name}.png", "group": "x/a.png", "kept": name == "a", "similarity": 1.0} for name in "ab"]
    dataset = create_dataset(folder, "duplicates", DUPLICATES_SCHEMA, config={}, shards=1)
    with write_shard(dataset, 0, 2) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, DUPLICATES_SCHEMA))
    dataset.finish()
    return folder


def test_tars_contain_the_files_and_are_read_by_prepare(manifest: Path, tmp_path: Path) -> None:
    summary = export_images(manifest, tmp_path / "tars", "webdataset")
    assert summary == ExportSummary(4, {"NotFound": 1})
    with tarfile.open(tmp_path / "tars/part-00001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(files) == ["part-00001-000000.png", "part-00001-000000.txt", "part-00001-000000.json"]
    assert files["part-00001-000000.png"] == (tmp_path / "e.png").read_bytes()
    assert files["part-00001-000000.txt"] == b"caption e\nanother"
    assert json.loads(files["part-00001-000000.json"])["image_id"] == "x/e.png"
    prepared = prepare([str(tmp_path / "tars")], tmp_path / "prepared")
    assert (prepared.images, prepared.captions) == (4, 8)


def test_folders_list_their_images_without_duplicates_and_other_splits(manifest: Path, tmp_path: Path) -> None:
    duplicates = write_duplicates(tmp_path / "duplicates")
    export_images(manifest, tmp_path / "out", "metadata", selection=select_images(["train"], duplicates))
    rows = [json.loads(line) for line in (tmp_path / "out/part-00000/metadata.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == ["x/a.png", "x/c.png"]
    contents = [(tmp_path / "out/part-00000" / row["file_name"]).read_bytes() for row in rows]
    assert contents == [(tmp_path / "a.png").read_bytes(), (tmp_path / "c.png").read_bytes()]
    assert not (tmp_path / "out/part-00001").exists()


def test_second_run_writes_only_unfinished_shards(manifest: Path, tmp_path: Path) -> None:
    first = export_images(manifest, tmp_path / "tars", "webdataset")
    (tmp_path / "tars/__export/part-00001.json").unlink()
    (tmp_path / "tars/part-00001.tar").unlink()
    (tmp_path / "a.png").unlink()  # it is in a finished shard
    assert export_images(manifest, tmp_path / "tars", "webdataset") == first
    assert (tmp_path / "tars/part-00001.tar").exists()


def test_missing_marker_is_an_error_rather_than_a_missing_shard(manifest: Path, tmp_path: Path) -> None:
    (manifest / "__shards" / "part-00001.json").unlink()
    with pytest.raises(DamagedShardError, match="its marker is missing"):
        export_images(manifest, tmp_path / "tars", "webdataset")


@pytest.mark.parametrize(
    ("export_format", "name", "content"),
    [
        ("webdataset", "part-00000.tar", None),
        ("metadata", "part-00000/metadata.jsonl", None),
        ("webdataset", "__export/part-00000.json", b"\0"),
        ("webdataset", "__export/part-00000.json", b'{"images": "many"}'),
    ],
)
def test_shard_whose_files_are_missing_or_damaged_is_exported_again(
    manifest: Path, tmp_path: Path, export_format: ExportFormat, name: str, content: bytes | None
) -> None:
    expected = export_images(manifest, tmp_path / "out", export_format)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "out" / name).unlink() if content is None else (tmp_path / "out" / name).write_bytes(content)
    assert export_images(manifest, tmp_path / "out", export_format) == expected
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == files.keys()


@pytest.mark.parametrize("content", [None, b"{"])
def test_export_without_a_valid_description_starts_again(manifest: Path, tmp_path: Path, content: bytes | None) -> None:
    expected = export_images(manifest, tmp_path / "out", "webdataset")
    description = tmp_path / "out/__export/export.json"
    description.unlink() if content is None else description.write_bytes(content)
    (tmp_path / "a.png").unlink()  # it is missing from a new export
    again = export_images(manifest, tmp_path / "out", "webdataset")
    assert again == ExportSummary(expected.images - 1, {"NotFound": 2})


def test_folder_with_other_files_is_refused(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("part-00000.tar", "notes.txt"):
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(DatasetError, match=rf"got other files \({name}\)"):
            export_images(manifest, tmp_path / "out", "webdataset")
        (tmp_path / "out" / name).unlink()


def write_manifest(folder: Path, shards: Sequence[str]) -> None:
    """Writes a manifest whose shards have images with one-letter names."""
    dataset = create_dataset(folder, "manifest", MANIFEST_SCHEMA, config={}, shards=len(shards), manifest_id="example")
    dataset.mark_incomplete()
    for shard, names in enumerate(shards):
        rows = [
            {"image_id": name, "uri": str(folder.parent / f"{name}.png"), "split": "train", "captions": [name]}
            for name in names
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, MANIFEST_SCHEMA))
    dataset.finish()


def test_export_follows_an_update_of_its_dataset(manifest: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "growing", ["ab", "c", "e"])
    export_images(tmp_path / "growing", tmp_path / "out", "txt")
    written = (tmp_path / "out/part-00000/000000.txt").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "growing")
    write_manifest(tmp_path / "growing", ["ab", "ce"])
    assert export_images(tmp_path / "growing", tmp_path / "out", "txt") == ExportSummary(4)
    texts = {str(path.relative_to(tmp_path / "out")): path.read_text() for path in (tmp_path / "out").rglob("*.txt")}
    assert texts == {f"part-0000{at // 2}/00000{at % 2}.txt": name for at, name in enumerate("abce")}
    assert (tmp_path / "out/part-00000/000000.txt").stat().st_mtime_ns == written, "the shard has not changed"
    assert not (tmp_path / "out/__export/part-00002.json").exists()


def test_two_exports_to_a_folder_do_not_mix(manifest: Path, tmp_path: Path) -> None:
    with (
        lock_folder(Folder(tmp_path / "out"), "captionlib export"),
        pytest.raises(LockError, match="in use by `captionlib export`"),
    ):
        export_images(manifest, tmp_path / "out", "metadata")
    export_images(manifest, tmp_path / "out", "metadata")
    assert not (tmp_path / "out/_lock").exists()


def test_folder_that_is_removed_during_an_export_is_an_error(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folder, "remove_temporary_files", lambda folder: shutil.rmtree(folder.uri))
    with pytest.raises(DatasetError, match="out was removed or moved during the export"):
        export_images(manifest, tmp_path / "out", "webdataset")


def test_different_export_in_the_folder_and_empty_split_are_refused(manifest: Path, tmp_path: Path) -> None:
    export_images(manifest, tmp_path / "tars", "webdataset")
    with pytest.raises(FingerprintError, match="with a different format or selection"):
        export_images(manifest, tmp_path / "tars", "metadata")
    with pytest.raises(DatasetError, match=r"expected at least one selected image \(splits: test\)"):
        export_images(manifest, tmp_path / "none", "webdataset", selection=select_images(["test"]))


def test_txt_writes_the_captions_beside_each_image(manifest: Path, tmp_path: Path) -> None:
    assert export_images(manifest, tmp_path / "out", "txt") == ExportSummary(4, {"NotFound": 1})
    files = {file.name: file.read_bytes() for file in (tmp_path / "out/part-00001").iterdir()}
    assert files == {"000000.png": (tmp_path / "e.png").read_bytes(), "000000.txt": b"caption e\nanother"}
    assert len(list((tmp_path / "out/part-00000").iterdir())) == 6


def test_export_with_a_different_selection_is_refused(manifest: Path, tmp_path: Path) -> None:
    for included, expected in ((frozenset({"x/a.png"}), 1), (frozenset({"x/a.png"}), 1)):
        summary = export_images(manifest, tmp_path / "out", "txt", selection=select_images(included=included))
        assert summary.images == expected
    for selection in (select_images(included=frozenset({"x/b.png"})), select_images(["train"]), select_images()):
        with pytest.raises(FingerprintError, match="with a different format or selection"):
            export_images(manifest, tmp_path / "out", "txt", selection=selection)
