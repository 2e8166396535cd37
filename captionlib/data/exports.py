"""Exports images with their captions for other programs, as WebDataset tars or as folders of images.

    output/
      part-00000.tar                            `webdataset`: an image, a .txt and a .json per sample
      part-00000/000000.jpg, metadata.jsonl     `metadata`: imagefolder of Hugging Face's `datasets`
      part-00000/000000.jpg, 000000.txt         `txt`: the captions beside each image, one per line
      __export/export.json                      what is exported
      __export/part-00000.json                  counts of a finished shard

A shard of a dataset becomes one tar or folder. A second run skips finished shards, and so resumes the first.
"""

import io
import json
import os
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
from captionlib.data.shards.markers import decode_record, encode_record, part_name, to_json
from captionlib.errors import ConfigError, DatasetError, FetchError, FingerprintError
from captionlib.progress import progress_bar
from captionlib.storage.folders import TEMPORARY_FOLDER, Addresses, Folder, list_addresses
from captionlib.storage.lock import LOCK_FILE, lock_folder

__all__ = ["EXPORT_COLUMNS", "ExportFormat", "ExportSummary", "add_sample", "export_images", "find_problem"]

ExportFormat = Literal["webdataset", "metadata", "txt"]

EXPORT_COLUMNS = ("image_id", "uri", "split", "width", "height", "caption", "captions", "log_prob")
"""The columns of an exported row."""

_THREADS = 16
_METADATA_FOLDER = "__export"  # `datasets` ignores folders whose names begin with two underscores
_DESCRIPTION = f"{_METADATA_FOLDER}/export.json"


@dataclass(frozen=True)
class ExportSummary:
    """Counts of an export.

    Attributes:
        images: number of exported images.
        failures: number of images that could not be read, by reason.
    """

    images: int
    failures: dict[str, int] = field(default_factory=dict)


_SUMMARY = TypeAdapter(ExportSummary)


def export_images(
    datasets: Addresses,
    output: str | os.PathLike[str],
    to: ExportFormat,
    *,
    selection: ImageSelection = ALL_IMAGES,
    fetch: FetchConfig | None = None,
    progress: bool = False,
) -> ExportSummary:
    """Writes the images of datasets with their captions, or resumes an interrupted export.

    Args:
        datasets: complete manifests, features or captions.
        output: folder to write.
        to: `webdataset`, `metadata` for Hugging Face's imagefolder format, or `txt` for a .txt beside each image.
        selection: the images to export.
        fetch: limits on fetching an image. If None, the defaults of `FetchConfig`.
        progress: show a progress bar.

    Raises:
        ConfigError: a dataset has no captions.
        DatasetError: a dataset is not complete, the output has other files or is damaged, or no image is selected.
        FingerprintError: the output contains a different export.
        LockError: another process is writing to the output.
    """
    opened = [open_dataset(address).require_complete() for address in list_addresses(datasets)]
    for dataset in opened:
        if dataset.kind not in ("manifest", "features", "captions"):
            raise ConfigError(f"{dataset.folder.uri}: expected a manifest, features or captions, got {dataset.kind}")
    export = _Export(Folder(output), to, selection)
    checksums = [dataset.compute_content_checksum() for dataset in opened]
    images, failures = 0, Counter[str]()
    # The marker of a shard is the file that records that the shard is complete.
    shards = [(each, shard, marker.rows) for each in opened for shard, marker in sorted(each.read_markers().items())]
    with ExitStack() as stack:
        stack.enter_context(lock_folder(export.folder, "captionlib export"))
        export.claim_folder({"to": to, "datasets": checksums, **selection.describe()})
        bar = stack.enter_context(progress_bar("export", sum(rows for _, _, rows in shards), "images", progress))
        threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="export"))
        fetcher = stack.enter_context(ImageFetcher(fetch))
        for part, (dataset, shard, rows) in enumerate(shards):
            counts = export.read_counts(part)
            if counts is None:
                counts = export.write_shard(part, dataset, shard, fetcher, threads)
            bar.update(rows)
            images += counts.images
            failures.update(counts.failures)
        export.finish()
    if not images and not failures:
        raise DatasetError(
            f"expected at least one selected image (splits: {', '.join(sorted(selection.splits)) or 'any'}), got none; "
            "check --split, --where and --duplicates"
        )
    return ExportSummary(images, dict(failures.most_common()))


@dataclass(frozen=True)
class _Export:
    """An export to a folder. A `part` is the number of a tar or subfolder of the export."""

    folder: Folder
    to: ExportFormat
    selection: ImageSelection

    def claim_folder(self, description: Mapping[str, Any]) -> None:
        """Writes the description of the export to a new folder. Rejects a folder with a different description."""
        if not self.folder.exists(_DESCRIPTION):
            if names := [name for name in self.folder.list() if name not in (LOCK_FILE, TEMPORARY_FOLDER)]:
                raise DatasetError(
                    f"{self.folder.uri}: expected a new or empty folder, got files ({names[0]}); choose a new folder, "
                    "or delete this one if it contains only a damaged export"
                )
            self.folder.write(_DESCRIPTION, encode_record(description))
            return
        try:
            existing = decode_record(self.folder.read(_DESCRIPTION))
        except ValueError as error:
            raise DatasetError(
                f"{self.folder.address(_DESCRIPTION)} is damaged ({error}); export to a new folder"
            ) from error
        if existing != description:
            raise FingerprintError(
                f"{self.folder.uri} contains an export with a different format, selection or content; "
                "choose a new folder"
            )

    def read_counts(self, part: int) -> ExportSummary | None:
        """Returns the counts of a part if it is finished. Otherwise, or if the counts are damaged, returns None."""
        try:
            counts = _SUMMARY.validate_python(decode_record(self.folder.read(self._counts_file(part))))
        except (FileNotFoundError, ValueError):
            return None
        return counts if counts.images == 0 or self.folder.exists(self._data_file(part)) else None

    def finish(self) -> None:
        """Removes temporary files.

        Raises:
            DatasetError: the folder was removed meanwhile.
        """
        self.folder.remove_temporary_files()
        if not self.folder.exists(_DESCRIPTION):
            raise DatasetError(
                f"{self.folder.uri} was removed or moved during the export; delete it and run the command again"
            )

    def _counts_file(self, part: int) -> str:
        return f"{_METADATA_FOLDER}/{part_name(part)}.json"

    def _data_file(self, part: int) -> str:
        endings = {"webdataset": ".tar", "metadata": "/metadata.jsonl", "txt": ""}
        return part_name(part) + endings[self.to]

    def write_shard(
        self, part: int, dataset: ShardedDataset, shard: int, fetcher: ImageFetcher, threads: ThreadPoolExecutor
    ) -> ExportSummary:
        """Writes a part, and then the file with its counts, which marks the part as finished."""
        failures = Counter[str]()
        samples = self._read_samples(dataset, shard, fetcher, threads, failures)
        write = self._write_tar if self.to == "webdataset" else self._write_folder
        images = write(part_name(part), samples)
        counts = ExportSummary(images, dict(failures))
        self.folder.write(self._counts_file(part), encode_record(asdict(counts)))
        return counts

    def _read_samples(
        self,
        dataset: ShardedDataset,
        shard: int,
        fetcher: ImageFetcher,
        threads: ThreadPoolExecutor,
        failures: Counter[str],
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the selected rows with the bytes of their images. Counts unreadable images in `failures`."""

        def fetch(row: dict[str, Any]) -> bytes | FetchError:
            try:
                return fetcher.fetch(row["uri"])
            except FetchError as error:
                return error

        columns = [name for name in EXPORT_COLUMNS if name in dataset.schema.names]
        for batch in dataset.read_batches(shard, columns, batch_size=2 * _THREADS):  # limits the images in memory
            rows = [row for row in batch.to_pylist() if self.selection.selects(row["image_id"], row["split"])]
            for row, content in zip(rows, threads.map(fetch, rows), strict=True):
                problem = content.reason if isinstance(content, FetchError) else find_problem(content)
                if problem is not None:
                    failures[problem] += 1
                elif isinstance(content, bytes):
                    yield row, content

    def _write_tar(self, name: str, samples: Iterator[tuple[dict[str, Any], bytes]]) -> int:
        """Returns the number of written images."""
        count = 0
        with self.folder.stage(f"{name}.tar") as path, tarfile.open(path, "w") as tar:
            for row, content in samples:
                add_sample(tar, f"{name}-{count:06}", row, content)
                count += 1
        return count

    def _write_folder(self, name: str, samples: Iterator[tuple[dict[str, Any], bytes]]) -> int:
        """Returns the number of written images."""
        self.folder.remove(name)  # an interrupted run may have left images
        lines: list[str] = []
        for row, content in samples:
            stem = f"{len(lines):06}"
            file_name = f"{stem}{_find_extension(content)}"
            self.folder.write(f"{name}/{file_name}", content)
            if self.to == "txt":
                self.folder.write(f"{name}/{stem}.txt", _join_captions(row))
            lines.append(json.dumps({"file_name": file_name, **row}, ensure_ascii=False))
        if lines and self.to == "metadata":
            self.folder.write(f"{name}/metadata.jsonl", "".join(f"{line}\n" for line in lines).encode())
        return len(lines)


def find_problem(content: bytes) -> str | None:
    """Returns why the bytes of an image cannot be exported; None if they can."""
    return "UnknownFormat" if find_format(content) is None else None


def add_sample(tar: tarfile.TarFile, key: str, row: Mapping[str, Any], content: bytes) -> None:
    """Adds a sample of WebDataset to a tar: the image, its captions as text, and the row as JSON.

    Args:
        tar: the open tar.
        key: name of the three files, without extension.
        row: the row, whose keys are some of `EXPORT_COLUMNS`.
        content: bytes of the image; `find_problem` returns None for them.
    """
    for extension, data in (
        (_find_extension(content), content),
        (".txt", _join_captions(row)),
        (".json", to_json(row)),
    ):
        member = tarfile.TarInfo(key + extension)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _join_captions(row: Mapping[str, Any]) -> bytes:
    """Returns the captions of a row as text, one per line."""
    captions = row["captions"] if "captions" in row else [row["caption"]]
    return "\n".join(" ".join(caption.split()) for caption in captions).encode()


def _find_extension(content: bytes) -> str:
    image_format = find_format(content)
    assert image_format is not None, "samples have a known format"
    return image_format.extensions[0]
