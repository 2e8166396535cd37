"""Exports images with their captions for other programs, as WebDataset tars or as folders of images.

    output/
      part-00000.tar                            `webdataset`: an image, a .txt and a .json per sample
      part-00000/000000.jpg, metadata.jsonl     `metadata`: imagefolder format of Hugging Face's `datasets`
      part-00000/000000.jpg, 000000.txt         `txt`: the captions beside each image, one per line
      __export/export.json                      what is exported
      __export/part-00000.json                  counts of a finished shard

Each shard (Parquet file) of a dataset becomes one tar or folder. A second run exports only unfinished and changed
shards.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from captionlib.data.images.fetching import FetchConfig, ImageFetcher
from captionlib.data.images.formats import find_format
from captionlib.data.selection import ALL_IMAGES, ImageSelection
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import Marker, from_json_with_checksum, part_name, to_json, to_json_with_checksum
from captionlib.errors import ConfigError, DatasetError, FetchError, FingerprintError
from captionlib.progress import progress_bar
from captionlib.storage.folders import TEMPORARY_FOLDER, Addresses, Folder, list_addresses
from captionlib.storage.lock import LOCK_FILE, lock_folder

__all__ = ["EXPORT_COLUMNS", "ExportFormat", "ExportSummary", "add_sample", "export_images", "find_problem"]

ExportFormat = Literal["webdataset", "metadata", "txt"]

EXPORT_COLUMNS = ("image_id", "uri", "split", "width", "height", "caption", "captions", "log_prob")
"""Columns of an exported row. `caption` is a generated caption with its `log_prob`; `captions` are the references."""

_THREADS = 16
_STATE_FOLDER = "__export"  # `datasets` ignores folders whose names begin with two underscores
_DESCRIPTION = f"{_STATE_FOLDER}/export.json"
_PART = re.compile(r"part-([0-9]+)(\.tar)?")


@dataclass(frozen=True)
class ExportSummary:
    """The number of exported images, and the number of images that could not be read, by reason."""

    images: int
    failures: dict[str, int] = field(default_factory=dict)


_SUMMARY = TypeAdapter(ExportSummary)


def export_images(
    datasets: Addresses,
    output: str | os.PathLike[str],
    export_format: ExportFormat,
    *,
    selection: ImageSelection = ALL_IMAGES,
    fetch: FetchConfig | None = None,
    progress: bool = False,
) -> ExportSummary:
    """Writes the images of datasets with their captions.

    An existing export of the same datasets is resumed or updated: only unfinished and changed shards are written.

    Args:
        datasets: complete manifests (lists of images), features or captions.
        output: folder to write.
        export_format: `webdataset`, `metadata` for Hugging Face's imagefolder format, or `txt` for a .txt beside each
            image.
        selection: the images to export.
        fetch: limits on fetching an image.
        progress: show a progress bar.

    Raises:
        ConfigError: a dataset has no captions.
        DatasetError: a dataset is not complete, the output has other files, or no image is selected.
        FingerprintError: the output contains an export of other datasets, or with a different format or selection.
        LockError: another process is writing to the output.
    """
    opened = [open_dataset(address).require_complete() for address in list_addresses(datasets)]
    for dataset in opened:
        if dataset.kind not in ("manifest", "features", "captions"):
            raise ConfigError(f"{dataset.folder.uri}: expected a manifest, features or captions, got {dataset.kind}")
    folder = Folder(output)
    # A dataset is identified by its manifest and by a hash (fingerprint) of its configuration.
    identities = [f"{dataset.manifest_id} {dataset.fingerprint}" for dataset in opened]
    images, failures = 0, Counter[str]()
    # The marker of a shard records that the shard is complete.
    shards = [(each, marker) for each in opened for _, marker in sorted(each.require_all_markers().items())]
    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder, "captionlib export"))
        bar = stack.enter_context(progress_bar("export", sum(marker.rows for _, marker in shards), "images", progress))
        threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="export"))
        fetcher = stack.enter_context(ImageFetcher(fetch))
        export = _Export(folder, export_format, selection, fetcher, threads)
        export.claim_folder({"format": export_format, "datasets": identities, **selection.describe()})
        for part, (dataset, marker) in enumerate(shards):
            counts = export.read_counts(part, marker) or export.write_shard(part, dataset, marker)
            bar.update(marker.rows)
            images += counts.images
            failures.update(counts.failures)
        export.finish(len(shards))
    if not images and not failures:
        raise DatasetError(
            f"expected at least one selected image (splits: {', '.join(sorted(selection.splits)) or 'any'}), got none; "
            "check --split, --where and --duplicates"
        )
    return ExportSummary(images, dict(failures.most_common()))


@dataclass(frozen=True)
class _Export:
    """An export to a folder. `part` is the number of a tar or subfolder of the export."""

    folder: Folder
    export_format: ExportFormat
    selection: ImageSelection
    fetcher: ImageFetcher
    threads: ThreadPoolExecutor

    def claim_folder(self, description: Mapping[str, Any]) -> None:
        """Checks that the folder is empty or contains this export. Empties it if its description is damaged."""
        names = [name for name in self.folder.list() if name not in (LOCK_FILE, TEMPORARY_FOLDER)]
        others = [name for name in names if _find_part(name) is None and name != _STATE_FOLDER]
        if others or (names and _STATE_FOLDER not in names):
            raise DatasetError(
                f"{self.folder.uri}: expected a new or empty folder or an earlier export, got other files "
                f"({(others or names)[0]}); choose a new folder"
            )
        existing = self._read_record(_DESCRIPTION)
        if existing is None:
            for name in reversed(names):  # `__export` last, because it identifies the folder as an export
                self.folder.remove(name)
            self.folder.write(_DESCRIPTION, to_json_with_checksum(description))
        elif existing != description:
            raise FingerprintError(
                f"{self.folder.uri} contains an export of other datasets, or with a different format or selection; "
                "choose a new folder"
            )

    def read_counts(self, part: int, marker: Marker) -> ExportSummary | None:
        """Returns the counts of a part. Returns None if it is unfinished or damaged, or if its shard has changed."""
        record = self._read_record(self._counts_file(part))
        if record is None or record.pop("checksum", None) != marker.checksum:
            return None
        try:
            counts = _SUMMARY.validate_python(record)
        except ValueError:
            return None
        return counts if counts.images == 0 or self.folder.exists(self._data_file(part)) else None

    def finish(self, parts: int) -> None:
        """Removes temporary files, and parts of shards that no longer exist."""
        self.folder.remove_temporary_files()
        for name in self.folder.list():
            if (part := _find_part(name)) is not None and part >= parts:
                self.folder.remove(self._counts_file(part))
                self.folder.remove(name)
        if not self.folder.exists(_DESCRIPTION):
            raise DatasetError(f"{self.folder.uri} was removed or moved during the export; run the same command again")

    def _read_record(self, name: str) -> dict[str, Any] | None:
        """Returns the content of a JSON file, or None if it is missing or damaged."""
        try:
            return from_json_with_checksum(self.folder.read(name))
        except (FileNotFoundError, ValueError):
            return None

    def _counts_file(self, part: int) -> str:
        return f"{_STATE_FOLDER}/{part_name(part)}.json"

    def _data_file(self, part: int) -> str:
        endings = {"webdataset": ".tar", "metadata": "/metadata.jsonl", "txt": ""}
        return part_name(part) + endings[self.export_format]

    def write_shard(self, part: int, dataset: ShardedDataset, marker: Marker) -> ExportSummary:
        """Writes a part, and then its counts, which mark it as finished."""
        failures = Counter[str]()
        samples = self._read_samples(dataset, marker.shard, failures)
        write = self._write_tar if self.export_format == "webdataset" else self._write_folder
        images = write(part_name(part), samples)  # also fills `failures`
        counts = ExportSummary(images, dict(failures))
        record = {**asdict(counts), "checksum": marker.checksum}
        self.folder.write(self._counts_file(part), to_json_with_checksum(record))
        return counts

    def _fetch(self, row: dict[str, Any]) -> bytes | str:
        """Returns the bytes of an image, or the reason why it cannot be exported."""
        try:
            content = self.fetcher.fetch(row["uri"])
        except FetchError as error:
            return error.reason
        return find_problem(content) or content

    def _read_samples(
        self, dataset: ShardedDataset, shard: int, failures: Counter[str]
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the selected rows with the bytes of their images. Counts unreadable images in `failures`."""
        columns = [name for name in EXPORT_COLUMNS if name in dataset.schema.names]
        for batch in dataset.read_batches(shard, columns, batch_size=2 * _THREADS):  # limits the images in memory
            rows = [row for row in batch.to_pylist() if self.selection.selects(row["image_id"], row["split"])]
            for row, content in zip(rows, self.threads.map(self._fetch, rows), strict=True):
                if isinstance(content, bytes):
                    yield row, content
                else:
                    failures[content] += 1

    def _write_tar(self, name: str, samples: Iterator[tuple[dict[str, Any], bytes]]) -> int:
        count = 0
        with self.folder.stage(f"{name}.tar") as path, tarfile.open(path, "w") as tar:
            for row, content in samples:
                add_sample(tar, f"{name}-{count:06}", row, content)
                count += 1
        return count

    def _write_folder(self, name: str, samples: Iterator[tuple[dict[str, Any], bytes]]) -> int:
        self.folder.remove(name)  # an interrupted run may have left images
        lines: list[str] = []
        for row, content in samples:
            stem = f"{len(lines):06}"
            file_name = f"{stem}{_find_extension(content)}"
            self.folder.write(f"{name}/{file_name}", content)
            if self.export_format == "txt":
                self.folder.write(f"{name}/{stem}.txt", _join_captions(row))
            lines.append(json.dumps({"file_name": file_name, **row}, ensure_ascii=False))
        if lines and self.export_format == "metadata":
            self.folder.write(f"{name}/metadata.jsonl", "".join(f"{line}\n" for line in lines).encode())
        return len(lines)


def find_problem(content: bytes) -> str | None:
    """Returns the reason why the bytes of an image cannot be exported, or None if they can."""
    return "UnknownFormat" if find_format(content) is None else None


def add_sample(tar: tarfile.TarFile, key: str, row: Mapping[str, Any], content: bytes) -> None:
    """Adds a WebDataset sample to a tar: an image of a known format, its captions as text, and the row as JSON.

    `key` is the name of the three files, without extension.
    """
    files = {_find_extension(content): content, ".txt": _join_captions(row), ".json": to_json(row)}
    for extension, data in files.items():
        member = tarfile.TarInfo(key + extension)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _find_part(name: str) -> int | None:
    """Returns the number of the part that a file or folder contains; None for other files."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match else None


def _join_captions(row: Mapping[str, Any]) -> bytes:
    captions = row["captions"] if "captions" in row else [row["caption"]]
    return "\n".join(" ".join(caption.split()) for caption in captions).encode()


def _find_extension(content: bytes) -> str:
    image_format = find_format(content)
    assert image_format is not None, "samples have a known format"
    return image_format.extensions[0]
