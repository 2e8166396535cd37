"""Measures how many planted near-duplicates `deduplicate` finds among embeddings of real photographs.

    python -m benchmarks.near_duplicates flickr8k vgg16.safetensors --threads 2

Copies of photographs of Flickr8k are planted: a third is encoded as JPEG again, a third is resized to 60%, and a third
is cropped by 2% of each side's length. VGG-16 up to `features.29` encodes photographs and copies, and a ranker that is
trained on the photographs with the recipe `flickr8k` embeds them. Means of the embeddings of three photographs fill up
the collection. A copy must be in the group of its original, and no other images may be in a group.

The features are kept in `--output`, so a second run only groups the embeddings.
"""

import argparse
import hashlib
import io
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.bars import report, run_benchmark
from captionlib.config import load_config
from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.images.decoding import Preprocessing, decode_image
from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.shards.dataset import create_dataset, open_dataset
from captionlib.data.shards.schemas import embeddings_schema, features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.models.encoders.encoder import Encoder, EncoderConfig, load_encoder
from captionlib.models.families.ranker import open_ranker
from captionlib.recipes import find_recipe
from captionlib.search.duplicates import DEFAULT_THRESHOLD, find_duplicates
from captionlib.storage.folders import stage_file
from captionlib.training.ranking import RankerTrainingConfig, train_ranker

_KINDS = ("encoded", "resized", "cropped")
_BATCH = 32
_SHARD_ROWS = 10_000

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Images:
    """Encoded images. `features` is `[images, 512]`; `sizes` is `[images, 2]`, width and height."""

    names: list[str]
    features: Features
    sizes: npt.NDArray[np.int32]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(EncoderConfig("vgg16", "features.29", options.weights, pooling="mean", dtype="bfloat16"))
    files = sorted((Path(options.data) / "images").glob("*.jpg"))[: options.photographs]
    photographs = encode_images(output / "photographs", encoder, options.size, files, (None,))
    step = max(1, len(files) // options.copies)
    copies = encode_images(output / "copies", encoder, options.size, files[::step][: options.copies], _KINDS)
    ranker = open_ranker(train_once(output, Path(options.data), encoder, photographs, options.set), "cpu")
    vectors = [ranker.encode_images(images.features) for images in (photographs, copies)]
    mixtures, mixed = build_mixtures(
        photographs, vectors[0], options.images - len(photographs.names) - len(copies.names)
    )
    write_embeddings(output / "embeddings", [photographs, copies, mixtures], np.concatenate([*vectors, mixed]))
    shutil.rmtree(output / "duplicates", ignore_errors=True)
    started = time.process_time()
    summary = find_duplicates(output / "embeddings", output / "duplicates", options.threshold)
    print(f"# grouping takes {time.process_time() - started:.0f} s of CPU time")
    evaluate(output, summary.images, copies.names, options.threshold)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder of Flickr8k, with images/ and the text files")
    parser.add_argument("weights", help="file with the weights of VGG-16, or one of torchvision's names")
    parser.add_argument("--output", default=".bench/near-duplicates")
    parser.add_argument("--images", type=int, default=100_000, help="size of the collection")
    parser.add_argument("--photographs", type=int, default=None)
    parser.add_argument("--copies", type=int, default=5_000)
    parser.add_argument("--size", type=int, default=224, help="side of the encoder's input in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="setting of the training of the ranker")
    parser.add_argument("--threshold", type=float, default=DEFAULT_THRESHOLD)
    return parser.parse_args()


def encode_images(
    cache: Path, encoder: Encoder, size: int, files: Sequence[Path], kinds: Sequence[str | None]
) -> Images:
    """Encodes files, each changed in one of several ways in turn. Batches in the cache, a folder, are not encoded."""
    preprocessing = replace(encoder.preprocessing, resize_size=size, crop_size=size)
    assert isinstance(preprocessing, Preprocessing)
    cache.mkdir(parents=True, exist_ok=True)
    names, features, sizes = [], [], []
    for start in range(0, len(files), _BATCH):
        chosen = [(file, kinds[at % len(kinds)]) for at, file in enumerate(files[start : start + _BATCH], start)]
        names += [file.name if kind is None else f"{file.name}#{kind}" for file, kind in chosen]
        batch = cache / f"{hashlib.sha256(f'{size} {chosen}'.encode()).hexdigest()[:16]}.npz"
        if not batch.exists():
            decoded = [decode_image(change(file, kind), preprocessing) for file, kind in chosen]
            encoded = encoder.encode(np.stack([image.pixels for image in decoded]))
            with stage_file(batch) as path, path.open("wb") as target:
                np.savez(target, features=encoded, sizes=[(image.width, image.height) for image in decoded])
        stored = np.load(batch)
        features.append(stored["features"].astype(np.float32))
        sizes.append(stored["sizes"].astype(np.int32))
    return Images(names, np.concatenate(features), np.concatenate(sizes))


def change(path: Path, kind: str | None) -> bytes:
    """Returns the content of an image file, or that of a copy."""
    if kind is None:
        return path.read_bytes()
    image = Image.open(path).convert("RGB")
    if kind == "resized":
        image = image.resize((round(image.width * 0.6), round(image.height * 0.6)), Image.Resampling.BICUBIC)
    if kind == "cropped":
        margins = round(image.width * 0.01), round(image.height * 0.01)
        image = image.crop((*margins, image.width - margins[0], image.height - margins[1]))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=60 if kind == "encoded" else 90)
    return content.getvalue()


def train_once(output: Path, data: Path, encoder: Encoder, photographs: Images, overrides: Sequence[str]) -> Path:
    """Trains a ranker on the photographs with their captions, unless it was trained before. Returns its folder."""
    if not (output / "ranker").exists():
        settings = PrepareConfig(check_images=False)
        prepare([str(data / "Flickr8k.token.txt")], output / "manifest", settings, progress=False)
        manifest = open_dataset(output / "manifest")
        schema = features_schema(encoder.shape[0], "float32")
        config = {"encoder": encoder.description}
        dataset = create_dataset(output / "features", "features", schema, config=config, source=manifest)
        positions = {name: at for at, name in enumerate(photographs.names)}
        for shard in range(manifest.shards):
            rows = manifest.read(shard)
            names = [Path(uri).name for uri in rows["uri"].to_pylist()]
            rows = rows.filter(pa.array([name in positions for name in names]))
            chosen = photographs.features[[positions[name] for name in names if name in positions]]
            with write_shard(dataset, shard, rows.num_rows) as writer:
                writer.write(rows.append_column("features", numpy_to_vectors(chosen)))
        dataset.finish()
        training = load_config(RankerTrainingConfig, str(find_recipe("flickr8k", "train-ranker")), overrides)
        train_ranker(output / "features", output / "ranker", training, device="cpu", progress=False)
    return output / "ranker"


def build_mixtures(photographs: Images, vectors: Features, count: int) -> tuple[Images, Features]:
    """Returns the means of the embeddings of random triples of photographs, as unit vectors. No triple occurs twice."""
    generator = np.random.default_rng(0)
    triples = np.sort(generator.integers(0, len(vectors), (2 * count, 3)), axis=1)
    triples = np.unique(triples[(np.diff(triples) > 0).all(axis=1)], axis=0)
    triples = generator.permutation(triples)[:count]
    sums = vectors[triples].sum(axis=1)
    names = ["mixture-" + "-".join(map(str, triple)) for triple in triples]
    sizes = np.full((len(triples), 2), 500, np.int32)
    return Images(names, photographs.features[:0], sizes), sums / np.linalg.norm(sums, axis=1, keepdims=True)


def write_embeddings(folder: Path, groups: Sequence[Images], vectors: Features) -> None:
    names = [name for images in groups for name in images.names]
    sizes = np.concatenate([images.sizes for images in groups])
    order = np.random.default_rng(1).permutation(len(names))
    parts = np.array_split(order, -(-len(order) // _SHARD_ROWS))
    schema = embeddings_schema(vectors.shape[1])
    dataset = create_dataset(folder, "embeddings", schema, config={}, shards=len(parts), overwrite=True)
    for shard, part in enumerate(parts):
        with write_shard(dataset, shard, len(part)) as writer:
            for chosen in np.array_split(part, -(-len(part) // 1000)):
                ids = pa.array([names[at] for at in chosen])
                writer.write(
                    pa.RecordBatch.from_arrays(
                        [
                            *(ids, ids, pa.nulls(len(chosen), pa.string())),
                            *(pa.array(sizes[chosen, axis]) for axis in (0, 1)),
                            *(ids, numpy_to_vectors(vectors[chosen].astype(np.float16))),
                        ],
                        schema=schema,
                    )
                )
    dataset.finish()


def evaluate(output: Path, images: int, copies: Sequence[str], threshold: float) -> None:
    """Reports recall and precision over pairs of an image and the kept image of its group."""
    rows = open_dataset(output / "duplicates").read(0)
    found = {
        image_id: group
        for image_id, group, kept in zip(*(rows[name].to_pylist() for name in rows.schema.names[:3]), strict=True)
        if not kept
    }
    correct = [name for name in copies if find_original(name) == find_original(found.get(name, ""))]
    others = Counter(kind_of_pair(name, group) for name, group in found.items() if name not in set(correct))
    for kind in _KINDS:
        planted = [name for name in copies if name.endswith(f"#{kind}")]
        print(f"# {kind}: {len(set(planted) & set(correct)):,} of {len(planted):,} copies found")
    print(f"# {images:,} images, threshold {threshold}; other pairs: {dict(others)}")
    for name, group in [pair for pair in found.items() if pair[0] not in set(correct)][:10]:
        print(f"#   {name} in the group of {group}")
    report("near-duplicates-recall", len(correct) / len(copies), 0.98)
    report("near-duplicates-precision", len(correct) / max(1, len(found)), 0.98)


def find_original(name: str) -> str:
    return name.partition("#")[0]


def kind_of_pair(*names: str) -> str:
    kinds = ["mixture" if name.startswith("mixture-") else "copy" if "#" in name else "photograph" for name in names]
    return " and ".join(sorted(kinds))


if __name__ == "__main__":
    run_benchmark(main)
