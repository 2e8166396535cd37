"""Measures an update of a collection in which 1% of the images are new, 0.2% changed and 0.2% deleted.

The first figure counts images with a wrong row. Before the update, the bytes of all unchanged images are replaced by
zeros, with the same size and modification time, so a row of such an image is right only if it was copied. The second
figure is the time of the update, from the source to the index, divided by that of the first run. The network is one
convolution; 20 ms are added for each image that it encodes, the cost of VGG-16 on a small GPU.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bars import measure_seconds, report, run_benchmark
from benchmarks.synthetic_images import write_images
from benchmarks.tiny_project import create_project, run_command
from captionlib.data.images.loading import hash_content
from captionlib.data.shards.dataset import open_dataset
from captionlib.search.index import open_index

SECONDS_PER_IMAGE = 0.02
IMAGES_PER_FOLDER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="number of images (default 100,000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wrong, ratio = measure_update(Path(scratch), options.images)
    report("collection-update-wrong-rows", wrong, 0, at_least=False)
    report("collection-update-ratio", ratio, 0.05, at_least=False)


def measure_update(folder: Path, count: int) -> tuple[int, float]:
    """Returns the number of images with a wrong row, and the ratio of times."""
    captioner = train_captioner(folder)
    images = write_source(folder / "images", count)
    collection = folder / "collection"
    run_command("init", collection, "--source", folder / "images", "--captioner", captioner)
    first = update(collection)
    print(f"# {count:,} images: {first:.0f} s without the added time", flush=True)
    expected, processed = change_source(folder, images)
    second = update(collection)
    print(f"# update: {processed:,} images encoded, {second:.0f} s without the added time", flush=True)
    ratio = (second + SECONDS_PER_IMAGE * processed) / (first + SECONDS_PER_IMAGE * count)
    return count_wrong(collection, expected), ratio


def train_captioner(folder: Path) -> Path:
    """Trains a captioner whose encoder is the first convolution of a network. Returns its folder."""
    project = create_project(folder / "project")
    encoder = ("model=squeezenet1_1", "node=features.1", "weights=random:0", "pooling=mean", "dtype=float32")
    run_command("extract-features", project / "manifest", "-o", folder / "features", *set_values("encoder", encoder))
    captioner = ("hidden_size=8", "embedding_size=8")
    training = [*set_values("captioner", captioner), *("--set", "training.epochs=1", "--set", "min_count=1")]
    run_command("train-captioner", folder / "features", "-o", folder / "captioner", *training)
    return folder / "captioner"


def set_values(group: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in ("--set", f"{group}.{value}")]


def write_source(folder: Path, count: int) -> list[Path]:
    """Writes `count` different images. Bytes after the end of a JPEG, which decoders ignore, make them different."""
    templates = [path.read_bytes() for path in write_images(folder.with_name("templates"), 100, size=64)]
    paths = []
    for number in range(count):
        path = folder / f"{number // IMAGES_PER_FOLDER:04d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(templates[number % len(templates)] + number.to_bytes(8, "big"))
        paths.append(path)
    return paths


def change_source(folder: Path, images: list[Path]) -> tuple[dict[str, str], int]:
    """Adds, changes and removes images, and replaces all others by zeros.

    Returns:
        The content hash of each image by id, and the number of new and changed images.
    """
    generator = random.Random(0)
    new, different = len(images) // 100, len(images) // 500
    touched = generator.sample(range(len(images)), 2 * different)
    deleted, changed = ({images[number] for number in part} for part in (touched[:different], touched[different:]))
    expected = {}
    for path in images:
        image_id = path.relative_to(folder / "images").as_posix()
        content = path.read_bytes()
        if path in deleted:
            path.unlink()
            continue
        if path in changed:
            content += b"changed"
            path.write_bytes(content)
        else:
            status = path.stat()
            path.write_bytes(bytes(len(content)))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        expected[image_id] = f"{hash_content(content):016x}"
    template = (folder / "templates" / "000000.jpg").read_bytes()
    for number in range(new):
        path = images[generator.randrange(len(images))].with_name(f"new-{number:06d}.jpg")
        content = template + f"new {number}".encode()
        path.write_bytes(content)
        expected[path.relative_to(folder / "images").as_posix()] = f"{hash_content(content):016x}"
    return expected, new + different


def count_wrong(collection: Path, expected: dict[str, str]) -> int:
    """Returns the number of images whose row is missing, superfluous or not that of the expected content."""
    captions = open_dataset(collection / "images" / "captions").require_complete()
    found: dict[str, str] = {}
    for shard in range(captions.shards):
        rows = captions.read(shard, ["image_id", "content_hash"])
        found |= zip(rows["image_id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True)
    missing_in_index = abs(open_index(collection / "index").description.captions_count - len(expected))
    return missing_in_index + sum(found.get(name) != expected.get(name) for name in {**found, **expected})


def update(collection: Path) -> float:
    """Returns the wall time of an update in seconds."""
    return measure_seconds(lambda: run_command("update", collection, "--device", "cpu", "--no-progress"))


if __name__ == "__main__":
    run_benchmark(main)
