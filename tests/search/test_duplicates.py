import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.inspection import inspect_dataset
from captionlib.data.shards.schemas import embeddings_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DamagedShardError
from captionlib.search.duplicates import find_duplicates


def write_embeddings(folder: Path, *shards: list[tuple[str, list[float], int, str | None]]) -> ShardedDataset:
    """Writes shards of (image id, vector, side in pixels, content hash)."""
    schema = embeddings_schema(len(shards[0][0][1]))
    dataset = create_dataset(folder, "embeddings", schema, config={}, shards=len(shards))
    dataset.mark_incomplete()
    for shard, images in enumerate(shards):
        rows = [
            {
                "image_id": image_id,
                "uri": f"{image_id}.jpg",
                "width": side,
                "height": side,
                "content_hash": content_hash,
                "embedding": (np.array(vector) / np.linalg.norm(vector)).astype(np.float16),
            }
            for image_id, vector, side, content_hash in images
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema))
    dataset.finish()
    return dataset


def read_groups(folder: Path) -> list[tuple[str, str, bool]]:
    rows = open_dataset(folder, "duplicates").require_complete().read(0).to_pylist()
    return [(row["image_id"], row["group"], row["kept"]) for row in rows]


def test_keeps_the_largest_image_of_each_group(tmp_path: Path) -> None:
    write_embeddings(
        tmp_path / "embeddings",
        [("small", [1, 0.01, 0], 10, None), ("other", [0, 1, 0], 10, None)],
        [("large", [1, 0, 0], 20, None), ("third", [0, 0, 1], 10, None)],
    )
    summary = find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")
    assert read_groups(tmp_path / "duplicates") == [("large", "large", True), ("small", "large", False)]
    assert (summary.images, summary.groups, summary.duplicates) == (4, 1, 1)


def test_similarity_is_the_cosine_to_the_kept_image(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings", [("a", [1, 0], 20, None), ("b", [4, 3], 10, None)])
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates", 0.75)
    similarity = open_dataset(tmp_path / "duplicates").read(0)["similarity"].to_pylist()
    assert similarity == pytest.approx([1, 0.8], abs=1e-3)


def test_groups_do_not_grow_through_chains(tmp_path: Path) -> None:
    angles = [0, 0.2, 0.4]  # the cosine is 0.98 between neighbors and 0.92 between the first and the last
    images = [(name, [np.cos(angle), np.sin(angle)], 10, None) for name, angle in zip("abc", angles, strict=True)]
    write_embeddings(tmp_path / "embeddings", images)
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates", 0.95)
    assert read_groups(tmp_path / "duplicates") == [("a", "a", True), ("b", "a", False)]


def test_copies_of_a_near_duplicate_join_its_group(tmp_path: Path) -> None:
    images = [("a", [1, 0], 30, "11"), ("b", [1, 0.01], 20, "22"), ("c", [1, 0.01], 20, "22")]
    write_embeddings(tmp_path / "embeddings", images)
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")
    assert [group for _, group, _ in read_groups(tmp_path / "duplicates")] == ["a", "a", "a"]


def test_threshold_1_groups_only_images_with_equal_bytes(tmp_path: Path) -> None:
    images = [("a", [1, 0], 1, "11"), ("b", [1, 0], 1, "22"), ("c", [0, 1], 1, "11"), ("d", [1, 0], 1, None)]
    write_embeddings(tmp_path / "embeddings", [*images, ("e", [1, 0], 1, None)])
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates", 1)
    assert read_groups(tmp_path / "duplicates") == [("a", "a", True), ("c", "a", False)]


def test_second_run_follows_the_embeddings(tmp_path: Path) -> None:
    near = [("a", [1, 0], 30, None), ("b", [1, 0.01], 20, None)]
    write_embeddings(tmp_path / "embeddings", near)
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")
    first = (tmp_path / "duplicates" / "part-00000.parquet").stat().st_mtime_ns
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")
    assert (tmp_path / "duplicates" / "part-00000.parquet").stat().st_mtime_ns == first
    write_embeddings(tmp_path / "embeddings", [near[0], ("b", [0, 1], 20, None)])
    assert find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates").duplicates == 0


def test_inspect_compares_duplicates_with_all_embeddings(tmp_path: Path) -> None:
    for vector in ([1, 0], [0, 1]):
        write_embeddings(tmp_path / "embeddings", [("a", vector, 20, None)], [("b", [1, 0], 10, None)])
        stale = [inspect_dataset(tmp_path / "duplicates").stale] if vector == [0, 1] else []
        find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")
        assert [*stale, inspect_dataset(tmp_path / "duplicates").stale] == [*([1] if stale else []), 0]


def test_dataset_without_images_has_no_duplicates(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path / "embeddings", "embeddings", embeddings_schema(4), config={}, shards=1)
    with write_shard(dataset, 0, 0):
        pass
    dataset.finish()
    assert find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates").images == 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 1000))
def test_near_duplicates_form_the_clusters_they_were_generated_from(clusters: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    centers = np.linalg.qr(generator.normal(size=(16, 6)))[0].T  # orthogonal, so clusters are not similar
    images = [
        (f"{number:03}", (centers[cluster] + 0.01 * generator.normal(size=16)).tolist(), 10, None)
        for number, cluster in enumerate(clusters)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_embeddings(folder / "embeddings", images)
        find_duplicates(folder / "embeddings", folder / "duplicates", 0.95)
        groups = {image_id: group for image_id, group, _ in read_groups(folder / "duplicates")}
    for number, cluster in enumerate(clusters):
        first = f"{clusters.index(cluster):03}"
        expected = first if clusters.count(cluster) > 1 else None
        assert groups.get(f"{number:03}") == expected


def test_missing_marker_is_an_error_rather_than_a_missing_image(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings", [("a", [1, 0], 20, None)], [("b", [1, 0], 10, None)])
    (tmp_path / "embeddings" / "__shards" / "part-00001.json").unlink()
    with pytest.raises(DamagedShardError, match="its marker is missing"):
        find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")


def test_duplicates_are_incomplete_while_they_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_embeddings(tmp_path / "embeddings", [("a", [1, 0], 20, None)])
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")
    write_embeddings(tmp_path / "new", [("b", [1, 0], 20, None)])
    shutil.rmtree(tmp_path / "embeddings")
    (tmp_path / "new").rename(tmp_path / "embeddings")
    complete = []

    def write_and_look(dataset: ShardedDataset, *arguments: Any) -> Any:
        complete.append(dataset.is_complete())
        return write_shard(dataset, *arguments)

    monkeypatch.setattr("captionlib.search.duplicates.write_shard", write_and_look)
    find_duplicates(tmp_path / "embeddings", tmp_path / "duplicates")
    assert complete == [False]
    assert read_groups(tmp_path / "duplicates") == []
