"""Keeps a collection of Flickr8k up to date for ten days, and checks it every day against its source.

    python -m benchmarks.daily_portions flickr8k
    python -m benchmarks.daily_portions flickr8k --s3
    python -m benchmarks.daily_portions flickr8k --beam-options .cluster/run/flink.yaml

Every day, images are added to the source, some are replaced by other bytes under the same name, some are deleted, and
some are withdrawn with `captionlib remove`, while their files stay in the source. `captionlib update` follows, and one
`captionlib serve` runs from the first day to the last. The encoder has random weights, and the captioner and the ranker
are small and hardly trained, because the captions do not matter here.

The checks read the Parquet, Arrow and JSON files without captionlib. On a disk, the bytes of unchanged images are
replaced by zeros, with the same size and modification time, before each update. An image that is read again thus
becomes a failure. On S3, the requests are counted.

`--s3` starts a local S3 server. The file of `--beam-options` names the runner; `make cluster-up` writes one.
"""

import argparse
import io
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from PIL import Image

from benchmarks.bars import measure_seconds, report, run_benchmark
from benchmarks.s3_server import S3Server, run_s3_server
from benchmarks.server import get_json, serve
from benchmarks.tiny_project import run_command

DATASETS = ("manifest", "captions", "embeddings")
SERVE_SECONDS = 300
TRAINING_IMAGES = 300

_ENCODER = (
    *("encoder.model=squeezenet1_1", "encoder.node=features.12.cat", "encoder.weights=random:0"),
    *("encoder.pooling=mean", "encoder.dtype=float32", "encoder.resize_size=224"),
)
_CAPTIONER = (
    *("captioner.hidden_size=128", "captioner.embedding_size=128", "captioner.principal_components=64"),
    *("training.optimizer=adam", "training.learning_rate=0.003", "training.epochs=6", "min_count=2", "batch_images=5"),
)
_RANKER = ("ranker.joint_embedding_size=64", "training.epochs=2", "min_count=2", "batch_images=50")


def main() -> None:
    options = parse_options()
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="captionlib-days-"))
        server = None
        if options.s3:
            server = stack.enter_context(run_s3_server())
            stack.enter_context(server.as_default())
        folder = "s3://bucket/days" if options.s3 else f"{scratch}/days"
        photographs = sorted((Path(options.data) / "images").glob("*.jpg"))[: options.days * options.portion]
        models = train_models(Path(options.data), photographs[:TRAINING_IMAGES], Path(scratch))
        beam_options = [f"@{options.beam_options}"] if options.beam_options else []
        collection = Collection(Source(folder, server), f"{folder}/collection", models, beam_options)
        problems = run_days(collection, photographs, options.days, stack)
    report("daily-portions-problems", problems, 0, at_least=False)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of Flickr8k, with images/ and Flickr8k.token.txt")
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument("--portion", type=int, default=300, help="new images per day")
    parser.add_argument("--s3", action="store_true", help="keep the source and the collection on a local S3 server")
    parser.add_argument("--beam-options", metavar="FILE", help="YAML file of Beam options, for each update")
    return parser.parse_args()


def train_models(data: Path, photographs: Sequence[Path], folder: Path) -> list[str]:
    """Trains a captioner and a ranker on a few images. Returns the options that name them."""
    references: dict[str, list[str]] = {}
    for line in (data / "Flickr8k.token.txt").read_text().splitlines():
        name, _, caption = line.partition("\t")
        references.setdefault(name.partition("#")[0], []).append(caption)
    images = [
        {
            "imgid": number,
            "filename": path.name,
            "split": "val" if number % 10 == 0 else "train",
            "sentences": [{"raw": caption} for caption in references[path.name]],
        }
        for number, path in enumerate(photographs)
    ]
    (folder / "dataset.json").write_text(json.dumps({"dataset": "flickr8k", "images": images}))
    manifest, features, captioner, ranker = (
        str(folder / name) for name in ("manifest", "features", "captioner", "ranker")
    )
    run_command("prepare", str(folder / "dataset.json"), "--images", str(data / "images"), "-o", manifest)
    run_command("extract-features", manifest, "-o", features, *set_values(_ENCODER))
    run_command("train-captioner", features, "-o", captioner, *set_values(_CAPTIONER))
    run_command("train-ranker", features, "-o", ranker, *set_values(_RANKER))
    return ["--captioner", captioner, "--ranker", ranker]


def set_values(values: Sequence[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


class Source:
    """The images of a source, on a disk or on S3, and the content that they should have."""

    def __init__(self, folder: str, server: S3Server | None) -> None:
        self.address = f"{folder}/source"
        self.contents: dict[str, bytes] = {}
        self.server = server
        self._fs, self._path = fsspec.core.url_to_fs(self.address)
        self._seen_requests = 0

    def write(self, name: str, content: bytes) -> None:
        self._fs.makedirs(self._path, exist_ok=True)
        self._fs.pipe_file(f"{self._path}/{name}", content)
        self.contents[name] = content

    def delete(self, name: str) -> None:
        self._fs.rm_file(f"{self._path}/{name}")
        del self.contents[name]

    def zero(self, names: Sequence[str]) -> None:
        """On a disk, replaces the bytes of images by zeros, with the same size and modification time."""
        if self.server is None:
            for path in (Path(self._path) / name for name in names):
                status = path.stat()
                path.write_bytes(bytes(status.st_size))
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def count_requested(self) -> Counter[str]:
        """Returns how often each image was requested from S3 since the last call."""
        assert self.server is not None
        requests = re.findall(r'"GET /bucket/days/source/([^ ?]+\.jpg) ', self.server.log.read_text())
        new, self._seen_requests = requests[self._seen_requests :], len(requests)
        return Counter(new)


@dataclass
class Day:
    """What happened to the source on a day, and what the update did."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    encoded: int = 0
    captioned: int = 0
    seconds: float = 0.0


@dataclass
class Collection:
    """A collection, its source, and the files that checks read."""

    source: Source
    address: str
    models: list[str]
    beam_options: Sequence[str]
    removed: set[str] = field(default_factory=set)  # withdrawn by `captionlib remove`

    def __post_init__(self) -> None:
        self._fs, self._path = fsspec.core.url_to_fs(self.address)

    def update(self) -> float:
        """Runs `captionlib update`, and returns its seconds."""
        command = ["update", self.address, "--device", "cpu", "--no-progress", "--", *self.beam_options]
        return measure_seconds(lambda: run_command(*command))

    def list_expected(self) -> list[str]:
        return sorted(set(self.source.contents) - self.removed)

    def read_files(self) -> Iterator[tuple[str, bytes]]:
        for path in self._fs.find(self._path):
            yield path.removeprefix(self._path).lstrip("/"), self._fs.cat_file(path)

    def read_dataset(self, kind: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for path in self._fs.glob(f"{self._path}/images/{kind}/*.parquet"):
            table = pq.read_table(io.BytesIO(self._fs.cat_file(path)))
            rows += table.drop_columns([name for name in ("embedding",) if name in table.column_names]).to_pylist()
        return rows

    def read_failures(self) -> list[str]:
        paths = self._fs.glob(f"{self._path}/images/captions/__failures/*.parquet")
        tables = [pq.read_table(io.BytesIO(self._fs.cat_file(path))) for path in paths]
        return [image_id for table in tables for image_id in table["image_id"].to_pylist()]

    def read_index_description(self) -> dict[str, Any]:
        description: dict[str, Any] = json.loads(self._fs.cat_file(f"{self._path}/index/index.json"))
        return description

    def read_index(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for shard in self.read_index_description()["shards"]:
            content = self._fs.cat_file(f"{self._path}/index/{shard['rows_file']}")
            rows += pa.ipc.open_file(pa.py_buffer(content)).read_all().to_pylist()
        return rows


def run_days(collection: Collection, photographs: Sequence[Path], days: int, stack: ExitStack) -> int:
    portion = len(photographs) // days
    problems: list[str] = []
    versions: dict[str, str] = {}
    get: Callable[[str], tuple[int, Any]] | None = None
    print("# day    new changed deleted removed encoded captioned images seconds")
    for number in range(1, days + 1):
        day = change_source(collection, photographs[(number - 1) * portion : number * portion])
        if number == 1:
            run_command("init", collection.address, "--source", collection.source.address, *collection.models)
        unchanged = set(collection.source.contents) - set(day.new) - set(day.changed)
        collection.source.zero(sorted(unchanged))
        day.seconds = collection.update()
        if get is None:
            thumbnails = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            port, _ = stack.enter_context(serve(collection.address, thumbnails, "--device", "cpu"))
            get = partial(get_json, port)
        found = check_datasets(collection, day, versions)
        found += check_removed(collection, day) + check_server(get, collection, day)
        print(
            f"# {number:3} {len(day.new):6} {len(day.changed):7} {len(day.deleted):7} {len(day.removed):7} "
            f"{day.encoded:7} {day.captioned:9} {len(collection.list_expected()):6} {day.seconds:7.1f}",
            flush=True,
        )
        for problem in found:
            print(f"#     {problem}", flush=True)
        problems += found
    return len(problems)


def change_source(collection: Collection, portion: Sequence[Path]) -> Day:
    """Withdraws, deletes, replaces and adds images. Names that are not new are taken from the whole collection."""
    old, share = collection.list_expected(), max(1, len(portion) // 30)
    picked = old[:: max(1, len(old) // (3 * share))][: 3 * share]
    day = Day([path.name for path in portion], picked[0::3], picked[1::3], picked[2::3])
    if day.removed:
        collection.removed |= set(day.removed)
        arguments = [word for name in day.removed for word in ("--id", name)]
        with tempfile.TemporaryDirectory() as thumbnails:
            run_command("remove", collection.address, *arguments, "--reason", "asked", "--thumbnails", thumbnails)
    for name in day.deleted:
        collection.source.delete(name)
    for name in day.changed:
        collection.source.write(name, replace_image(portion[0].with_name(name), len(collection.removed)))
    for path in portion:
        collection.source.write(path.name, path.read_bytes())
    return day


def replace_image(path: Path, number: int) -> bytes:
    """Returns different bytes for an image: it is rotated, and no two replacements of an image are the same."""
    content = io.BytesIO()
    Image.open(path).rotate(number + 1).save(content, "JPEG", quality=90)
    return content.getvalue()


def check_datasets(collection: Collection, day: Day, versions: dict[str, str]) -> list[str]:
    """Compares all datasets with the source, and returns the problems. Counts the images in `day`.

    `versions` holds the versions of the images on the previous day; the function replaces them.
    """
    rows = {kind: collection.read_dataset(kind) for kind in DATASETS} | {"index": collection.read_index()}
    current = {row["image_id"]: row["version"] for row in rows["manifest"]}
    different = [name for name, version in current.items() if versions.get(name) != version]
    day.captioned = sum(row["image_id"] in set(different) for row in rows["captions"])
    versions.clear()
    versions.update(current)
    names = {kind: [row["image_id"] for row in found] for kind, found in rows.items()}
    return [
        *(problem for kind in names for problem in compare(kind, names[kind], collection.list_expected())),
        *compare("new and changed versions", different, [*day.new, *day.changed]),
        *check_versions(collection.source, rows, current),
        *check_encoded(collection, day, different),
    ]


def check_versions(source: Source, rows: Mapping[str, list[dict[str, Any]]], current: Mapping[str, str]) -> list[str]:
    """Checks that each row is that of the current bytes of its image, and each caption in the index the current one."""
    captions = {row["image_id"]: row["caption"] for row in rows["captions"]}
    problems = []
    for kind in ("captions", "embeddings"):
        for row in rows[kind]:
            content = source.contents.get(row["image_id"], b"")
            if row["content_hash"] != f"{xxhash.xxh3_64_intdigest(content):016x}":
                problems.append(f"{kind}: {row['image_id']} has the row of other bytes")
            if row["version"] != current.get(row["image_id"]):
                problems.append(f"{kind}: {row['image_id']} has the row of another version")
    for row in rows["index"]:
        if row["caption"] != captions.get(row["image_id"]):
            problems.append(f"index: {row['image_id']} has another caption")
    return problems


def check_encoded(collection: Collection, day: Day, different: Sequence[str]) -> list[str]:
    """Checks that no image failed, and that only the images with a new version were read. Counts them in `day`."""
    failures = collection.read_failures()
    day.encoded = day.captioned + len(failures)
    problems = [f"failed: {name}" for name in failures]
    if collection.source.server is not None:
        requests = collection.source.count_requested()
        day.encoded = len(requests)
        problems += compare("requested images", list(requests), different)
    return problems


def compare(what: str, found: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Returns a problem if two lists differ in more than their order."""
    missing, extra = Counter(expected) - Counter(found), Counter(found) - Counter(expected)
    if not missing and not extra:
        return []
    return [f"{what}: {missing.total()} missing {list(missing)[:3]}, {extra.total()} extra {list(extra)[:3]}"]


def check_removed(collection: Collection, day: Day) -> list[str]:
    """Searches all files for ids that `captionlib remove` removed, and rows for images that were deleted."""
    problems = []
    for name, content in collection.read_files():
        text = content
        if name.endswith(".parquet"):
            text += str(pq.read_table(io.BytesIO(content)).to_pydict()).encode()
        if name.endswith(".arrow"):
            text += str(pa.ipc.open_file(pa.py_buffer(content)).read_all().to_pydict()).encode()
        problems += [f"{name} contains {image_id}" for image_id in collection.removed if image_id.encode() in text]
        if name.endswith(".parquet"):
            problems += [f"{name} contains {image_id}" for image_id in day.deleted if image_id.encode() in text]
    return problems


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SERVE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"waited {SERVE_SECONDS} s for {what}")
        time.sleep(0.1)


def check_server(get: Callable[[str], tuple[int, Any]], collection: Collection, day: Day) -> list[str]:
    """Checks that the server has taken up the new version, and has all images of the day but none that were deleted."""
    rows = {row["image_id"]: row for row in collection.read_index()}
    fingerprint = collection.read_index_description()["fingerprint"]
    wait_until(lambda: get("/health")[1]["index"] == fingerprint, "the server to take up the new version")
    problems = []
    for name in [*day.new, *day.changed]:
        status, content = get(f"/api/v1/image?id={quote(name)}")
        if status != 200 or content["caption"] != rows.get(name, {}).get("caption"):
            problems.append(f"serve: status {status} for the new image {name}, or an old caption")
    absent = {*day.deleted, *collection.removed}
    problems += [f"serve: {name} is still there" for name in absent if get(f"/api/v1/image?id={quote(name)}")[0] != 404]
    words = {name: set(re.findall(r"\w+", row["caption"].lower())) for name, row in rows.items()}
    for word in sorted(set().union(*(words.get(name, ()) for name in day.new)), key=len)[-3:]:
        expected = [name for name, contained in words.items() if word in contained]
        found = search(get, word)
        problems += compare(f"serve, search for {word}", found, expected)
    return problems


def search(get: Callable[[str], tuple[int, Any]], word: str) -> list[str]:
    """Returns the ids of all images that a search finds, page by page."""
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        _, page = get(f"/api/v1/search?limit=100&q={quote(word)}&cursor={cursor}")
        found += [result["image_id"] for result in page["results"]]
        cursor = page["next_cursor"]
    return found


if __name__ == "__main__":
    run_benchmark(main)
