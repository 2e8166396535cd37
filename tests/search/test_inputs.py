from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError, DatasetError
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index import open_index
from captionlib.search.inputs import find_manifest
from captionlib.storage.folders import Folder

from .conftest import rows


def write_captions_and_manifest(captions: str, manifest: str) -> ShardedDataset:
    source = create_dataset(manifest, "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    image = {"image_id": "1", "uri": "1.jpg", "split": "", "captions": ["a dog runs"]}
    with write_shard(source, 0, 1) as writer:
        writer.write(pa.RecordBatch.from_pylist([image], MANIFEST_SCHEMA))
    source.finish()
    marker = source.read_markers()[0]
    dataset = create_dataset(captions, "captions", captions_schema(), config={}, source=source)
    with write_shard(dataset, 0, 1, marker.checksum) as writer:
        writer.write(rows(("1", "a dog", -1.0)))
    dataset.finish()
    return dataset


def read_references(captions: ShardedDataset) -> list[list[str]] | None:
    manifest = find_manifest(captions)
    return None if manifest is None else manifest.read_references(0)["captions"].to_pylist()


def test_references_are_read_from_a_manifest_on_the_same_kind_of_storage(tmp_path: Path) -> None:
    local, remote = str(tmp_path), f"memory://{uuid4().hex}"
    for captions, manifest, is_found in (
        *((local, local, True), (remote, remote, True)),
        *((local, remote, False), (remote, local, False)),
    ):
        name = uuid4().hex
        dataset = write_captions_and_manifest(f"{captions}/{name}/captions", f"{manifest}/{name}/manifest")
        assert read_references(dataset) == ([["a dog runs"]] if is_found else None)


def test_captions_of_a_removed_manifest_have_no_references(tmp_path: Path) -> None:
    dataset = write_captions_and_manifest(str(tmp_path / "captions"), str(tmp_path / "manifest"))
    Folder(tmp_path).remove("manifest")
    assert find_manifest(dataset) is None
    (tmp_path / "manifest").touch()
    assert find_manifest(dataset) is None


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("_dataset.json", Path.mkdir, "Is a directory"),
        ("_dataset.json", Path.touch, "is damaged"),
        ("__shards/part-00000.json", lambda _: None, "its marker is missing"),
    ],
)
def test_manifest_that_cannot_be_read_is_an_error(
    file: str, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    captions, index = str(tmp_path / "captions"), str(tmp_path / "index")
    write_captions_and_manifest(captions, str(tmp_path / "manifest"))
    (tmp_path / "manifest" / file).unlink()
    damage(tmp_path / "manifest" / file)
    with pytest.raises(DatasetError, match=rf"cannot be read: .*{message}.*; .*set references=false$"):
        plan_build(captions, None, index, IndexConfig())
    build = plan_build(captions, None, index, IndexConfig(references=False))
    assert [shard.manifest for shard in build.shards] == [""]


def test_references_of_an_existing_index_can_be_left_out(tmp_path: Path) -> None:
    captions, index = str(tmp_path / "captions"), str(tmp_path / "index")
    write_captions_and_manifest(captions, str(tmp_path / "manifest"))
    for config, expected in ((IndexConfig(), ["a dog runs"]), (IndexConfig(references=False), None)):
        build = plan_build(captions, None, index, config)
        for position in build.added:
            build.add_shard(position)
        build.finish()
        assert open_index(index).get_details("1")["references"] == expected


def test_damaged_captions_are_named(tmp_path: Path) -> None:
    captions = str(tmp_path / "captions")
    write_captions_and_manifest(captions, str(tmp_path / "manifest"))
    (tmp_path / "captions" / "__shards" / "part-00000.json").unlink()
    with pytest.raises(DamagedShardError, match=r"captions/part-00000\.parquet"):
        plan_build(captions, None, str(tmp_path / "index"), IndexConfig())
