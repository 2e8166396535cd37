from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.schemas import DUPLICATES_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.search.config import IndexConfig
from captionlib.search.duplicates import find_duplicates
from captionlib.search.index import open_index
from captionlib.search.sql.session import open_sql
from jobs.cli import captionlib
from pipelines.build_index import build_index
from pipelines.run import RunConfig
from tests.search.example_index import WordRanker, make_rows, write_captions_dataset, write_embeddings_dataset

SHARDS = {0: make_rows(30), 1: make_rows(30, 30), 2: make_rows(30, 60)}
QUIET = RunConfig(progress=False)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    write_captions_dataset(str(tmp_path / "captions"), SHARDS, 3, {1: ["broken"]}).finish()
    write_embeddings_dataset(str(tmp_path / "embeddings"), SHARDS, 3, {1: ["broken"]}).finish()
    return tmp_path / "captions", tmp_path / "embeddings"


def write_duplicates(folder: Path, *groups: Sequence[str]) -> Path:
    rows = [
        {"image_id": image_id, "group": group[0], "kept": image_id == group[0], "similarity": 1.0}
        for group in groups
        for image_id in group
    ]
    dataset = create_dataset(folder, "duplicates", DUPLICATES_SCHEMA, config={"threshold": 0.9}, shards=1)
    dataset.mark_incomplete()
    with write_shard(dataset, 0, len(rows)) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, DUPLICATES_SCHEMA))
    dataset.finish()
    return folder


def search_all(index: Path) -> set[str]:
    return set(
        open_index(index).search_text("dog cat frisbee beach horse snow train pizza", 200)["image_id"].to_pylist()
    )


def test_index_contains_only_the_kept_images(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    captions, embeddings = inputs
    duplicates = write_duplicates(tmp_path / "duplicates", ["im5", "im0", "im29", "im89"], ["im31", "im30"])
    _, description = build_index(
        captions, tmp_path / "index", IndexConfig(), embeddings=embeddings, duplicates=duplicates, run=QUIET
    )
    assert (description.captions_count, description.vectors_count) == (86, 86)
    kept = {name: caption for rows in SHARDS.values() for name, caption, _ in rows}
    for name in ("im0", "im29", "im89", "im30"):
        del kept[name]
    assert search_all(tmp_path / "index") == set(kept)
    index = open_index(tmp_path / "index", WordRanker())
    for name, caption in kept.items():  # each vector belongs to the row of its image
        row = index._find_row(name)
        vector = index._require_vectors().get_vector(row)
        assert vector is not None
        np.testing.assert_allclose(vector, WordRanker().encode_sentences([caption])[0], atol=1e-3)


def test_changed_duplicates_change_only_their_shards(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    captions, embeddings = inputs

    def build(duplicates: Path | None) -> tuple[tuple[int, ...], int, str]:
        plan, description = build_index(
            captions, tmp_path / "index", IndexConfig(), embeddings=embeddings, duplicates=duplicates, run=QUIET
        )
        assert description.vectors_count == len(search_all(tmp_path / "index")) == description.captions_count
        return plan.added, description.captions_count, description.fingerprint

    everything = build(None)
    assert everything[:2] == ((0, 1, 2), 90)
    first = build(write_duplicates(tmp_path / "duplicates", ["im1", "im0"]))
    assert first[:2] == ((0,), 89)
    assert build(tmp_path / "duplicates") == ((), *first[1:])
    second = build(write_duplicates(tmp_path / "duplicates", ["im1", "im0"], ["im31", "im30"]))
    assert second[:2] == ((1,), 88)
    third = build(write_duplicates(tmp_path / "duplicates", ["im1", "im0"], ["im32", "im30"]))  # im30 is out as before
    assert third[:2] == ((), 88)
    assert len({everything[2], first[2], second[2], third[2]}) == 4
    assert build(None) == ((0, 1), *everything[1:])


def test_duplicates_that_were_left_out_are_indexed_with_overwrite(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    duplicates = write_duplicates(tmp_path / "duplicates", ["im1", "im0"])
    for keep, run, expected in ((False, QUIET, 89), (True, replace(QUIET, overwrite=True), 90)):
        config = IndexConfig(keep_duplicates=keep)
        _, description = build_index(inputs[0], tmp_path / "index", config, duplicates=duplicates, run=run)
        assert description.captions_count == expected
    assert open_index(tmp_path / "index").get_image("im0")["duplicate_of"] == "im1"


def test_group_without_its_kept_image_stays(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [{"image_id": name, "group": "gone", "kept": False, "similarity": 1.0} for name in ("im0", "im1")]
    dataset = create_dataset(tmp_path / "duplicates", "duplicates", DUPLICATES_SCHEMA, config={}, shards=1)
    with write_shard(dataset, 0, 2) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, DUPLICATES_SCHEMA))
    dataset.finish()
    _, description = build_index(
        inputs[0], tmp_path / "index", IndexConfig(), duplicates=tmp_path / "duplicates", run=QUIET
    )
    assert description.captions_count == 90


def test_sql_sees_only_the_kept_images(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    duplicates = write_duplicates(tmp_path / "duplicates", ["im1", "im0"])
    with open_sql(inputs[0], duplicates=duplicates) as session:
        assert session.query("SELECT count(*) AS n, min(image_id) AS first FROM captions").to_pylist() == [
            {"n": 89, "first": "im1"}
        ]
    arguments = ["query", str(inputs[0]), "--image-id", "im0", "--format", "jsonl"]
    assert CliRunner().invoke(captionlib, arguments).exit_code == 0
    left_out = CliRunner().invoke(captionlib, [*arguments, "--duplicates", str(duplicates)])
    assert "no image im0" in str(left_out.exception)


def test_duplicates_are_found_across_datasets(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 56)):  # captions repeat after 56 images, with other ids
        write_embeddings_dataset(str(tmp_path / name), {0: make_rows(5, start)}, 1).finish()
    folders = [tmp_path / "a", tmp_path / "b"]
    assert find_duplicates(tmp_path / "a", tmp_path / "alone").duplicates == 0
    summary = find_duplicates(folders, tmp_path / "duplicates")
    assert (summary.images, summary.groups, summary.duplicates) == (10, 5, 5)
    modified = (tmp_path / "duplicates/part-00000.parquet").stat().st_mtime_ns
    assert find_duplicates(folders, tmp_path / "duplicates") == summary
    assert (tmp_path / "duplicates/part-00000.parquet").stat().st_mtime_ns == modified
    assert open_dataset(tmp_path / "duplicates").is_complete()
