from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from captionlib.data.batches.captions import CaptionBatch
from captionlib.data.batches.images import ImageBatches, read_captioned_rows
from captionlib.data.batches.skipped import SkippedImages
from captionlib.data.images.loading import LoadedImage
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DatasetError, FailureRatioError, FetchError
from captionlib.storage.folders import Folder

IMAGES = 23
Pixels = npt.NDArray[np.uint8]


class Loader:
    """Loads image number n as two pixels of the values n and 0, fails for some, and records its calls."""

    def __init__(self, missing: Iterable[int] = ()) -> None:
        self.missing = set(missing)
        self.loaded: list[int] = []

    def __call__(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], LoadedImage | FetchError]]:
        for row in rows:
            number = int(row["image_id"])
            self.loaded.append(number)
            image = LoadedImage(np.array([[[number] * 3, [0] * 3]], np.uint8), 2, 1, 0)
            yield row, FetchError("HTTPError 404", "no such image") if number in self.missing else image


def table(images: int = IMAGES) -> pa.Table:
    rows = [{"image_id": str(n), "uri": f"/{n}.png", "captions": ["a b", "c"][: 1 + n % 2]} for n in range(images)]
    return pa.Table.from_pylist(
        rows, pa.schema([MANIFEST_SCHEMA.field(name) for name in ("image_id", "uri", "captions")])
    )


def make_skipped(folder: Path, allowed: float = 1.0) -> SkippedImages:
    return SkippedImages(Folder(folder), 0, IMAGES, allowed)


def batches(folder: Path, load: Loader, images: int = 4, horizontal_flip: bool = False) -> ImageBatches:
    return ImageBatches(
        table(),
        lambda sentence: [ord(word) for word in sentence.split()],
        images,
        load,
        make_skipped(folder),
        horizontal_flip,
    )


def numbers(batch: CaptionBatch | None) -> list[int]:
    """Returns the images of a batch; flipped ones are negative."""
    images = [] if batch is None else batch.features
    return [int(image.max()) if image[0, 0, 0] else -int(image.max()) for image in images]


def epoch(source: ImageBatches, number: int = 0, **options: Any) -> list[list[int]]:
    return [numbers(batch) for batch in source.shuffled(1, number, **options)]


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def test_epochs_have_each_image_once_in_different_orders(tmp_path: Path) -> None:
    source = batches(tmp_path, Loader())
    one, two = epoch(source), epoch(source, 1)
    assert len(one) == source.count() == 6
    assert sorted(flat(one)) == sorted(flat(two)) == list(range(IMAGES))
    assert one != two
    assert epoch(source) == one


def test_captions_belong_to_their_images(tmp_path: Path) -> None:
    for batch in batches(tmp_path, Loader()).in_order():
        for place, number in enumerate(numbers(batch)):
            own = [ids for ids, owner in zip(batch.sentences, batch.image_of_caption, strict=True) if owner == place]
            assert own == [[97, 98], [99]][: 1 + number % 2]


def test_missing_image_does_not_shift_others(tmp_path: Path) -> None:
    whole = epoch(batches(tmp_path, Loader()))
    missing = {3, 8, *whole[2]}
    left = epoch(batches(tmp_path, Loader(missing)))
    assert left == [[number for number in batch if number not in missing] for batch in whole]
    assert left[2] == []  # the batch is None
    in_order = [number for batch in batches(tmp_path, Loader(missing)).in_order() for number in numbers(batch)]
    assert in_order == [number for number in range(IMAGES) if number not in missing]


@pytest.mark.parametrize("first", [0, 2, 6])
def test_resumes_from_any_batch_without_loading_earlier_ones(tmp_path: Path, first: int) -> None:
    load = Loader()
    whole = epoch(batches(tmp_path, Loader(), horizontal_flip=True))
    assert epoch(batches(tmp_path, load, horizontal_flip=True), first_batch=first) == whole[first:]
    assert load.loaded == [abs(number) for number in flat(whole[first:])]


def test_parts_of_all_processes_make_up_the_batch(tmp_path: Path) -> None:
    alone = epoch(batches(tmp_path, Loader(), images=6))
    per_rank = [
        [numbers(b) for b in batches(tmp_path, Loader(), images=2).shuffled(1, 0, rank, 3)] for rank in range(3)
    ]
    assert [flat(parts) for parts in zip(*per_rank, strict=True)] == alone


def test_about_half_of_the_images_are_flipped_anew_in_each_epoch(tmp_path: Path) -> None:
    def flipped(number: int, horizontal_flip: bool) -> set[int]:
        return {
            image
            for image in flat(epoch(batches(tmp_path, Loader(), horizontal_flip=horizontal_flip), number))
            if image < 0
        }

    one, two = flipped(0, True), flipped(1, True)
    assert IMAGES / 4 < len(one) < 3 * IMAGES / 4
    assert one != two
    assert flipped(0, True) == one
    assert flipped(0, False) == set()


def test_skipped_images_are_recorded_once_and_reloaded(tmp_path: Path) -> None:
    skipped = make_skipped(tmp_path)
    source = ImageBatches(table(), lambda _: [4], 4, Loader({3, 5}), skipped)
    for number in range(2):
        list(source.shuffled(1, number))
    skipped.write()
    again = make_skipped(tmp_path)
    assert len(again) == 2
    assert again.describe() == "2 of 23 images are unreadable (HTTPError 404: 2)"


def test_too_many_skipped_images_fail_the_run(tmp_path: Path) -> None:
    source = ImageBatches(table(), lambda _: [4], 4, Loader({3, 5, 7}), make_skipped(tmp_path, 0.1))
    with pytest.raises(FailureRatioError, match=r"3 of 23 .*; the run allows 10.0%. The last is /7.png: no such image"):
        list(source.in_order())


def test_read_captioned_rows_selects_splits_and_captions(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=2)
    for shard in range(2):
        rows = [
            {"image_id": f"{shard}{n}", "uri": "", "split": split, "captions": captions}
            for n, (split, captions) in enumerate([("train", ["a"]), ("val", ["b"]), ("restval", []), ("train", [])])
        ]
        with write_shard(dataset, shard, len(rows)) as writer:
            writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
    dataset.finish()
    assert read_captioned_rows(dataset, ["train", "restval"])["image_id"].to_pylist() == ["00", "10"]
    with pytest.raises(DatasetError, match="expected captions in split restval, got none"):
        read_captioned_rows(dataset, ["restval"])
