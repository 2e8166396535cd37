from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captionlib.data.batches.captions import CaptionBatches, compute_mean_and_std, read_captions
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError

SHARDS, ROWS = 6, 5
SPLITS = ["train", "train", "val", "restval", "test"]


@pytest.fixture
def dataset(tmp_path: Path) -> ShardedDataset:
    """30 images; image n has the features (n, -n) and n % 3 captions, which are its number."""
    config = {"encoder": {"shape": [2]}}
    dataset = create_dataset(tmp_path, "features", features_schema(2, "float16"), config=config, shards=SHARDS)
    for shard in range(SHARDS):
        rows = [
            {"image_id": str(n), "uri": "", "split": SPLITS[n % 5], "captions": [str(n)] * (n % 3), "features": [n, -n]}
            for n in range(shard * ROWS, (shard + 1) * ROWS)
        ]
        with write_shard(dataset, shard, ROWS) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
    dataset.finish()
    return dataset


def encode(sentence: str) -> list[int]:
    return [int(sentence)]


IN_TRAIN = {n for n in range(30) if SPLITS[n % 5] in {"train", "restval"} and n % 3}


@pytest.mark.parametrize("buffer_bytes", [1, 45, 1 << 20])
def test_epoch_has_each_captioned_image_once(dataset: ShardedDataset, buffer_bytes: int) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4, buffer_bytes)
    for epoch in batches.shuffled(0, 0), batches.in_order():
        seen = []
        for batch in epoch:
            assert batch is not None
            assert len(batch.features) <= 4
            assert batch.features.dtype == np.float32
            np.testing.assert_array_equal(batch.features[:, 0], -batch.features[:, 1])
            of_sentence = batch.features[batch.image_of_caption, 0]
            assert [ids for (ids,) in batch.sentences] == of_sentence.tolist()
            seen += batch.features[:, 0].astype(int).tolist()
        assert sorted(seen) == sorted(IN_TRAIN)


def order(batches: CaptionBatches, seed: int, epoch: int) -> list[int]:
    return [int(n) for batch in batches.shuffled(seed, epoch) if batch is not None for n in batch.features[:, 0]]


@pytest.mark.parametrize("buffer_bytes", [45, 1 << 20])
def test_order_depends_only_on_seed_and_epoch(dataset: ShardedDataset, buffer_bytes: int) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4, buffer_bytes)
    again = CaptionBatches(dataset, ["train", "restval"], encode, 4, buffer_bytes)
    first = order(batches, 1, 1)
    assert first == order(again, 1, 1) == order(batches, 1, 1)
    assert first != order(batches, 1, 2)
    assert first != order(batches, 2, 1)


@pytest.mark.parametrize("buffer_bytes", [45, 1 << 20])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("first", [0, 2])
def test_parts_of_all_processes_make_up_the_batch(
    dataset: ShardedDataset, buffer_bytes: int, world_size: int, first: int
) -> None:
    splits = ["train", "restval"]
    single = CaptionBatches(dataset, splits, encode, 2 * world_size, buffer_bytes)
    shared = CaptionBatches(dataset, splits, encode, 2, buffer_bytes)
    assert shared.count(world_size) == single.count()
    per_rank = [shared.shuffled(3, 1, rank, world_size, first) for rank in range(world_size)]
    expected = list(single.shuffled(3, 1))[first:]
    for batch, parts in zip(expected, zip(*per_rank, strict=True), strict=True):
        assert batch is not None
        images = [n for part in parts if part is not None for n in part.features[:, 0]]
        assert images == batch.features[:, 0].tolist()
        assert [ids for part in parts if part is not None for ids in part.sentences] == batch.sentences


def test_batches_mix_images_of_different_shards(dataset: ShardedDataset) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4)
    shards = [[int(n) // ROWS for n in batch.features[:, 0]] for batch in batches.shuffled(0, 0) if batch is not None]
    assert max(len(set(batch)) for batch in shards) > 2


def test_mean_and_std_cover_the_selected_splits(dataset: ShardedDataset) -> None:
    numbers = np.array([n for n in range(30) if SPLITS[n % 5] == "train"], np.float64)
    mean, std = compute_mean_and_std(dataset, ["train"])
    np.testing.assert_allclose(mean, [numbers.mean(), -numbers.mean()], rtol=1e-6)
    np.testing.assert_allclose(std, [numbers.std(), numbers.std()], rtol=1e-6)


def test_read_captions_covers_the_selected_splits(dataset: ShardedDataset) -> None:
    assert sorted(set(read_captions(dataset, ["val"]))) == sorted(str(n) for n in (2, 7, 17, 22))
    assert list(read_captions(dataset, ["dev"])) == list(read_captions(dataset, ["val"]))
    with pytest.raises(
        DatasetError, match="expected captions in split x, got none; the dataset has the splits restval, test, train"
    ):
        list(read_captions(dataset, ["x"]))


@pytest.mark.parametrize("buffer_bytes", [1, 1 << 20])
@pytest.mark.parametrize("splits", [["train"], ["train", "restval"]])
def test_count_is_the_number_of_batches(dataset: ShardedDataset, splits: list[str], buffer_bytes: int) -> None:
    batches = CaptionBatches(dataset, splits, encode, 5, buffer_bytes)
    assert batches.count() == len(list(batches.in_order()))


def test_images_in_order_have_consecutive_positions(dataset: ShardedDataset) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4, 45)
    parts = list(batches.images_in_order())
    assert [position for positions, _ in parts for position in positions] == list(range(len(IN_TRAIN)))
    assert [n for _, features in parts for n in features[:, 0]] == sorted(IN_TRAIN)
