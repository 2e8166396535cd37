from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captionlib.data.batches.captions import CaptionBatches, mean_and_std, read_captions
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError

SHARDS, ROWS = 6, 5
SPLITS = ["train", "train", "val", "restval", "test"]


@pytest.fixture
def dataset(tmp_path: Path) -> ShardedDataset:
    """30 images; image n has features (n, -n) and n % 3 sentences, each of them its number."""
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


@pytest.mark.parametrize("window_bytes", [1, 45, 1 << 20])
def test_an_epoch_has_every_image_with_sentences_once(dataset: ShardedDataset, window_bytes: int) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4, window_bytes)
    for epoch in batches.epoch(0, 0), batches.in_order():
        seen = []
        for batch in epoch:
            assert len(batch.features) <= 4
            assert batch.features.dtype == np.float32
            np.testing.assert_array_equal(batch.features[:, 0], -batch.features[:, 1])
            of_sentence = batch.features[batch.image_of_sentence, 0]
            assert [ids for (ids,) in batch.sentences] == of_sentence.tolist()
            seen += batch.features[:, 0].astype(int).tolist()
        assert sorted(seen) == sorted(IN_TRAIN)


def order(batches: CaptionBatches, seed: int, epoch: int) -> list[int]:
    return [int(n) for batch in batches.epoch(seed, epoch) for n in batch.features[:, 0]]


@pytest.mark.parametrize("window_bytes", [45, 1 << 20])
def test_order_depends_on_seed_and_epoch_alone(dataset: ShardedDataset, window_bytes: int) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4, window_bytes)
    again = CaptionBatches(dataset, ["train", "restval"], encode, 4, window_bytes)
    first = order(batches, 1, 1)
    assert first == order(again, 1, 1) == order(batches, 1, 1)
    assert first != order(batches, 1, 2)
    assert first != order(batches, 2, 1)


@pytest.mark.parametrize("window_bytes", [45, 1 << 20])
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_make_up_the_batches_of_one_process(dataset: ShardedDataset, window_bytes: int, processes: int) -> None:
    splits = ["train", "restval"]
    whole = CaptionBatches(dataset, splits, encode, 2 * processes, window_bytes)
    shared = CaptionBatches(dataset, splits, encode, 2, window_bytes)
    assert shared.count(processes) == whole.count()
    parts = zip(*(shared.shares(3, 1, number, processes) for number in range(processes)), strict=True)
    for batch, shares in zip(whole.epoch(3, 1), parts, strict=True):
        images = [n for part in shares if part is not None for n in part.features[:, 0]]
        assert images == batch.features[:, 0].tolist()
        assert [ids for part in shares if part is not None for ids in part.sentences] == batch.sentences


@pytest.mark.parametrize("window_bytes", [45, 1 << 20])
def test_an_epoch_of_sentences_has_each_once_with_its_image(dataset: ShardedDataset, window_bytes: int) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4, window_bytes, sentences=3)
    seen = []
    for batch in batches.epoch(0, 0):
        assert len(batch.sentences) <= 3
        assert len(set(batch.features[:, 0])) == len(batch.features)
        assert [ids for (ids,) in batch.sentences] == batch.features[batch.image_of_sentence, 0].tolist()
        seen += [ids for (ids,) in batch.sentences]
    assert sorted(seen) == sorted(n for n in IN_TRAIN for _ in range(n % 3))
    assert batches.count() == -(-len(seen) // 3)
    together = [
        n for batch in batches.epoch(0, 0) if len(batch.features) < len(batch.sentences) for n in batch.features
    ]
    assert len(together) < len(seen) / 2  # the two sentences of an image seldom meet


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_sentences_make_up_the_batches_of_one_process(dataset: ShardedDataset, processes: int) -> None:
    splits = ["train", "restval"]
    whole = CaptionBatches(dataset, splits, encode, 1, sentences=2 * processes)
    shared = CaptionBatches(dataset, splits, encode, 1, sentences=2)
    parts = zip(*(shared.shares(3, 1, number, processes) for number in range(processes)), strict=True)
    for batch, shares in zip(whole.epoch(3, 1), parts, strict=True):
        assert [ids for part in shares if part is not None for ids in part.sentences] == batch.sentences
    later = list(shared.shares(3, 1, 0, processes, first=2))
    assert [part.sentences for part in later if part] == [
        part.sentences for part in list(shared.shares(3, 1, 0, processes))[2:] if part
    ]


def test_images_of_different_shards_are_mixed(dataset: ShardedDataset) -> None:
    batches = CaptionBatches(dataset, ["train", "restval"], encode, 4)
    shards = [[int(n) // ROWS for n in batch.features[:, 0]] for batch in batches.epoch(0, 0)]
    assert max(len(set(batch)) for batch in shards) > 2


def test_statistics_are_those_of_the_splits(dataset: ShardedDataset) -> None:
    numbers = np.array([n for n in range(30) if SPLITS[n % 5] == "train"], np.float64)
    mean, std = mean_and_std(dataset, ["train"])
    np.testing.assert_allclose(mean, [numbers.mean(), -numbers.mean()], rtol=1e-6)
    np.testing.assert_allclose(std, [numbers.std(), numbers.std()], rtol=1e-6)


def test_captions_are_those_of_the_splits(dataset: ShardedDataset) -> None:
    assert sorted(set(read_captions(dataset, ["val"]))) == sorted(str(n) for n in (2, 7, 17, 22))
    with pytest.raises(
        DatasetError, match="expected sentences in split dev, got none; its splits are restval, test, train"
    ):
        list(read_captions(dataset, ["dev"]))


def test_counts_batches(dataset: ShardedDataset) -> None:
    assert CaptionBatches(dataset, ["train"], encode, 5).count() == 3
