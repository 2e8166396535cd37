"""A small site of single-color images, with a ranker of words and a small image encoder."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import uvicorn
from fastapi import FastAPI
from PIL import Image

from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA, captions_schema
from captionlib.data.shards.writer import write_shard
from captionlib.errors import DecodeError
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.search.build import plan_build
from captionlib.search.config import IndexConfig
from captionlib.search.index import open_index
from captionlib.search.models import ImageQueryModels
from captionlib.serving.app import create_app
from captionlib.serving.config import ServingConfig
from captionlib.serving.service import SearchService
from tests.search.example_index import Row, WordRanker, make_rows, write_embeddings_dataset

MALICIOUS = '<script>document.title="stolen"</script>'
"""An image id and part of a caption that a page must not execute."""

MODIFIED_NS = 1_772_366_400_000_000_000
"""Time in the version of every other image, 1 March 2026 at noon. The others are a month later."""

_FAILURES = {"failed 0": "Truncated", "failed 1": "Truncated", "failed 2": "Odd"}
_CONFIG = {
    "captioner": "captioner-of-tests",
    "encoder": {
        "model": "vgg16",
        "node": "fc7",
        "preprocessing": {"resize_size": 256, "crop_size": 224, "interpolation": "bilinear", "mean": [0], "std": [1]},
    },
}

COLORS = ["teal", "crimson", "gold", "navy", "olive", "plum"]


@lru_cache(maxsize=1)
def _encoder_description() -> Mapping[str, Any]:
    config = EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean")
    return load_encoder(config, "cpu").description


def make_ranker() -> WordRanker:
    """Returns a ranker of words whose image encoder is a small network."""
    ranker = WordRanker()
    ranker.encoder = _encoder_description()
    return ranker


def make_site_rows(count: int) -> list[Row]:
    """Returns captions, one with malicious markup, and one of an image that does not exist."""
    return [*make_rows(count - 2), (MALICIOUS, f"a dog and a {MALICIOUS}", -2.0), ("gone", "a dog that has gone", -3.0)]


def make_site(
    folder: Path,
    count: int = 60,
    config: ServingConfig | None = None,
    with_models: bool = True,
    with_captioner: bool = False,
) -> FastAPI:
    """Writes images, captions and embeddings, indexes them, and creates the application."""
    rows = make_site_rows(count)
    _write_captions(folder, rows)
    write_embeddings_dataset(str(folder / "embeddings"), {0: rows}, 1, failed={0: list(_FAILURES)})
    build = plan_build(folder / "captions", folder / "embeddings", folder / "index", IndexConfig())
    build.train()
    build.add_shard(0)
    build.finish()
    ranker = make_ranker()
    index = open_index(folder / "index", ranker, refresh_seconds=None)
    limits = config or ServingConfig(allowed_hosts=("localhost", "127.0.0.1", "testserver"))
    decoding = DecoderConfig(max_image_pixels=limits.max_image_pixels)
    models = ImageQueryModels(ranker, device="cpu", image_decoding=decoding) if with_models else None
    if models is not None and with_captioner:
        _add_captioner(models)
    return create_app(SearchService(index, limits, models), folder / "thumbnails")


def _add_captioner(models: ImageQueryModels) -> None:
    """Makes models give every image the same captions; a real captioner would take seconds to load."""

    def caption(content: bytes) -> pa.Table:
        models.embed(content)  # rejects files that are not images
        return pa.table({"caption": ["a teal square", "a square"], "log_prob": [-1.5, -2.5], "tokens": [4, 3]})

    models.caption = caption  # type: ignore[method-assign]
    models._caption_encoder = models._embedding_encoder


@contextmanager
def serve_site(app: FastAPI) -> Iterator[str]:
    """Runs an application in a thread, and yields its URL."""
    server_socket = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([server_socket],))
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server_socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        server_socket.close()


def _write_captions(folder: Path, rows: list[Row]) -> None:
    values = []
    for number, (image_id, caption, log_prob) in enumerate(rows):
        path = folder / "images" / f"{number}.png"
        size = (160, 120) if number % 2 else (90, 140)
        if image_id != "gone":
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, COLORS[number % len(COLORS)]).save(path)
        values.append(
            {
                "image_id": image_id,
                "uri": str(path),
                "version": f"400-{MODIFIED_NS + number % 2 * 31 * 86_400 * 10**9:x}",
                "attention": [[1.0, 0.0, 0.0, 0.5]] * (len(caption.split()) + 1),
                "split": "val" if number % 3 else "train",
                "width": size[0] if number % 5 else None,
                "height": size[1] if number % 5 else None,
                "caption": caption,
                "log_prob": log_prob,
                "tokens": len(caption.split()) + 1,
                "candidates": [
                    {"caption": caption, "log_prob": log_prob},
                    {"caption": f"perhaps {caption}", "log_prob": log_prob - 1},
                ],
            }
        )
    manifest = _write_manifest(folder, values)
    schema = captions_schema(positions=4)
    dataset = create_dataset(folder / "captions", "captions", schema, config=_CONFIG, source=manifest)
    marker = manifest.read_marker(0)
    assert marker is not None
    with write_shard(dataset, 0, len(values) + len(_FAILURES), marker.checksum) as writer:
        writer.write(pa.RecordBatch.from_pylist(values, schema=schema))
        for image_id, reason in _FAILURES.items():
            writer.write_failure({"image_id": image_id, "uri": f"/secret/{image_id}"}, DecodeError(reason, "secret"))
    dataset.finish()


def _write_manifest(folder: Path, captioned: list[dict[str, Any]]) -> ShardedDataset:
    values = [
        {name: row[name] for name in ("image_id", "uri", "version", "split")}
        | {"captions": [f"a person wrote this about {number}"]}
        for number, row in enumerate(captioned)
    ]
    values += [
        {"image_id": image_id, "uri": f"/secret/{image_id}", "version": None, "split": "val", "captions": []}
        for image_id in _FAILURES
    ]
    manifest = create_dataset(folder / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    with write_shard(manifest, 0, len(values)) as writer:
        writer.write(pa.RecordBatch.from_pylist(values, schema=MANIFEST_SCHEMA))
    manifest.finish()
    return manifest
