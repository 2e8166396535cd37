from pathlib import Path

import pyarrow as pa
import pytest

from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.progress import show_progress
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import FetchError


def write(dataset: ShardedDataset, shard: int, failures: int) -> None:
    with write_shard(dataset, shard, 3) as writer:
        rows = [{"image_id": f"{shard}{n}", "uri": "", "split": "", "captions": []} for n in range(3 - failures)]
        writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
        for n in range(failures):
            writer.write_failure({"image_id": f"bad{shard}{n}", "uri": ""}, FetchError("Gone", "not there"))


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
    write(output, 0, 0)
    with show_progress(source, output, "label"):
        write(output, 1, 2)
    printed = capsys.readouterr().err
    assert printed.startswith("label: 6/6 images, ")
    assert "2/2 shards, 2 failed" in printed


def test_disabled_progress_prints_nothing(
    datasets: tuple[ShardedDataset, ShardedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress(*datasets, "label", enabled=False):
        write(datasets[1], 0, 0)
    assert capsys.readouterr().err == ""


def test_progress_ends_if_the_run_fails(
    datasets: tuple[ShardedDataset, ShardedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="died"), show_progress(*datasets, "label"):
        write(datasets[1], 0, 0)
        raise RuntimeError("died")
    assert "label: 3/6 images, " in capsys.readouterr().err
