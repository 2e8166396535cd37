"""Datasets: folders of Parquet shards, each of which is either complete or absent.

    folder/
      part-00000.parquet ...          rows; only complete files appear at the top level
      _dataset.json                   description: kind, schema, configuration, and a hash of them (fingerprint)
      _shards/part-00000.json ...     one marker per shard: a JSON file that marks it as finished
      _failures/part-00000.parquet    images of the shard that could not be read; absent if there are none
      _SUCCESS                        totals over all shards; written once all are finished

The files of a shard are written in the order data, failures, marker. If the writer dies in between, the shard has no
marker, and the next run writes it again.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.config import describe_differences
from captionlib.data.shards.markers import (
    DESCRIPTION_FILE,
    FAILURES_FOLDER,
    MARKERS_FOLDER,
    SUCCESS_FILE,
    Marker,
    Totals,
    compute_checksum,
    compute_fingerprint,
    part_name,
    sum_markers,
    to_json,
)
from captionlib.data.shards.schemas import SCHEMA_VERSION
from captionlib.errors import DatasetError, FailureRatioError, FingerprintError, StorageError
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["ShardedDataset", "create_dataset", "open_dataset"]


@dataclass(frozen=True)
class ShardedDataset:
    """A dataset in a folder. It pickles without reading its files, so it can be sent to workers.

    Attributes:
        folder: folder of the dataset.
        kind: manifest (images and reference captions), features, captions (generated) or embeddings.
        config: everything that determines the rows.
        fingerprint: hash of kind, schema version and config.
        shards: number of shards of the complete dataset.
        schema: Arrow schema of the shards.
    """

    folder: Folder
    kind: str
    config: Mapping[str, Any]
    fingerprint: str
    shards: int
    schema: pa.Schema

    def done_shards(self) -> set[int]:
        """Returns the numbers of the shards that have a marker. Lists the folder once."""
        names = (name for name in self.folder.list(MARKERS_FOLDER) if name.endswith(".json"))
        shards = {int(name.removeprefix("part-").removesuffix(".json")) for name in names}
        return {shard for shard in shards if shard < self.shards}

    def pending_shards(self) -> list[int]:
        """Returns the sorted numbers of the shards that have no marker."""
        return sorted(set(range(self.shards)) - self.done_shards())

    def read_marker(self, shard: int) -> Marker | None:
        """Returns the marker of a shard, or None if the shard is not finished."""
        return next(self.iter_markers([shard]), None)

    def read_markers(self, shards: Iterable[int] | None = None) -> dict[int, Marker]:
        """Returns the markers of the given shards, by shard. If None, all markers are returned."""
        return {marker.shard: marker for marker in self.iter_markers(self.done_shards() if shards is None else shards)}

    def iter_markers(self, shards: Iterable[int]) -> Iterator[Marker]:
        """Yields the markers of the given shards in any order. Reads them concurrently and in bounded memory."""
        for content in self.folder.read_many(f"{MARKERS_FOLDER}/{part_name(shard)}.json" for shard in sorted(shards)):
            marker = Marker(**json.loads(content))
            if marker.fingerprint == self.fingerprint:
                yield marker

    def compute_totals(self) -> Totals:
        """Sums the markers of all finished shards."""
        return sum_markers(self.iter_markers(self.done_shards()))

    def read_totals(self) -> Totals | None:
        """Returns the totals in `_SUCCESS`, or None if the file does not exist or belongs to a different dataset."""
        try:
            content = json.loads(self.folder.read(SUCCESS_FILE))
        except FileNotFoundError:
            return None
        return Totals(**content) if content.pop("fingerprint") == self.fingerprint else None

    def is_complete(self) -> bool:
        return self.folder.exists(SUCCESS_FILE)

    def mark_incomplete(self) -> None:
        """Marks the dataset as incomplete until `finish` is called. Call this before writing shards."""
        self.folder.remove_file(SUCCESS_FILE)

    def require_complete(self) -> "ShardedDataset":
        """Returns this dataset, or raises DatasetError if it is not complete."""
        if not self.is_complete():
            reason = self.explain_incompleteness(self.compute_totals())
            raise DatasetError(f"{self.folder.uri} is not complete: {reason}")
        return self

    def explain_incompleteness(self, totals: Totals) -> str:
        """Returns why a dataset with these totals has no `_SUCCESS`, and what to do."""
        again = "run the command that writes this dataset again"
        if totals.shards < self.shards:
            return f"expected {self.shards} finished shards, got {totals.shards}; {again}"
        if not totals.failures:
            return f"its {self.shards} shards are finished, but {SUCCESS_FILE} was not written; {again}"
        return (
            f"{totals.describe_failures()}, more than the run allowed; {again} with a higher --max-failure-ratio to "
            f"accept the failures (1 accepts all), or with --retry-failures to read these images again"
        )

    def part_path(self, shard: int) -> str:
        """Returns the path of a shard's data file within its file system."""
        return self.folder.path(f"{part_name(shard)}.parquet")

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads a shard into memory. If `columns` is None, all columns are read."""
        with self.folder.open(f"{part_name(shard)}.parquet") as file:
            return pq.ParquetFile(file).read(columns)

    def read_batches(
        self, shard: int, columns: Sequence[str] | None = None, batch_size: int = 256
    ) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a shard in batches of up to `batch_size`. Holds one row group in memory."""
        with self.folder.open(f"{part_name(shard)}.parquet") as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)  # reads a row group's columns with few requests
            for group in range(parquet.num_row_groups):
                yield from parquet.iter_batches(batch_size, row_groups=[group], columns=columns)

    def read_failures(self, shard: int) -> pa.Table | None:
        """Returns the images of a shard that could not be read, or None if there are none."""
        name = f"{FAILURES_FOLDER}/{part_name(shard)}.parquet"
        if not self.folder.exists(name):
            return None
        with self.folder.open(name) as file:
            return pq.read_table(file)

    def remove_marker(self, shard: int) -> None:
        """Removes the marker of a shard. The shard becomes pending again, and the dataset incomplete."""
        self.mark_incomplete()
        self.folder.remove_file(f"{MARKERS_FOLDER}/{part_name(shard)}.json")

    def finish(self, max_failure_ratio: float | None = None) -> Totals:
        """Checks that all shards are finished and writes `_SUCCESS`.

        Raises:
            DatasetError: a shard is not finished.
            FailureRatioError: the fraction of images that could not be read exceeds `max_failure_ratio`. If this is
                None, all images failed.
        """
        recorded = None if self.pending_shards() else self.read_totals()
        totals = recorded or self.compute_totals()
        if totals.shards < self.shards:
            missing = sorted(set(range(self.shards)) - set(self.read_markers()))
            raise DatasetError(
                f"{self.folder.uri}: expected {self.shards} finished shards, {len(missing)} are missing "
                f"(the first is {part_name(missing[0])}); run the command again to resume it"
            )
        if totals.exceeds(max_failure_ratio):
            self.mark_incomplete()
            limit = "a readable image" if max_failure_ratio is None else f"at most {max_failure_ratio:.1%}"
            raise FailureRatioError(
                f"{self.folder.uri}: {totals.describe_failures()}; expected {limit}. The finished shards are kept; see "
                f"{FAILURES_FOLDER}/, then run again with --retry-failures, or with a higher --max-failure-ratio "
                "(1 accepts all failures)"
            )
        if recorded is None:
            self.folder.write(SUCCESS_FILE, to_json({**asdict(totals), "fingerprint": self.fingerprint}))
            with suppress(StorageError):  # the files in it do no harm
                self.folder.remove(TEMPORARY_FOLDER)
        return totals

    def verify(self) -> list[str]:
        """Compares the checksums of data files with the markers, and returns a line per missing or changed file."""
        problems = []
        names = set(self.folder.list())
        for shard, marker in self.read_markers().items():
            name = f"{part_name(shard)}.parquet"
            if name not in names:
                problems.append(f"{name}: missing")
                continue
            with self.folder.open(name) as file:
                checksum = compute_checksum(file)
            if checksum != marker.checksum:
                problems.append(f"{name}: expected {marker.checksum}, got {checksum}")
        return problems


def open_dataset(uri: str | os.PathLike[str], kind: str | None = None) -> ShardedDataset:
    """Opens a dataset, which may be incomplete.

    Example:
        >>> captions = captionlib.open_dataset("captions", "captions").require_complete()
        >>> captions.read(0, columns=["image_id", "caption"]).num_rows
        26

    Args:
        uri: path or URL of the folder.
        kind: expected kind (manifest, features, captions or embeddings). If None, any kind is accepted.

    Raises:
        DatasetError: the folder is not a dataset, or the dataset has a different kind or schema version.
    """
    folder = Folder(uri)
    description = _read_description(folder)
    if description is None:
        got = "other files" if folder.list() else "a missing or empty folder"
        raise DatasetError(
            f"{folder.uri} is not a captionlib dataset: expected a folder with {DESCRIPTION_FILE}, got {got}; "
            "use the output of the previous stage"
        )
    if kind is not None and description["kind"] != kind:
        raise DatasetError(
            f"{folder.uri}: expected a dataset of kind {kind}, got {description['kind']}; "
            "`captionlib --help` shows what each stage reads"
        )
    if description["schema_version"] != SCHEMA_VERSION:
        raise DatasetError(
            f"{folder.uri}: expected schema version {SCHEMA_VERSION}, got {description['schema_version']}; "
            "write the dataset again with this version of captionlib"
        )
    schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(description["arrow_schema"])))
    fields = {name: description[name] for name in ("kind", "config", "fingerprint", "shards")}
    return ShardedDataset(folder, schema=schema, **fields)


def create_dataset(
    uri: str | os.PathLike[str],
    kind: str,
    schema: pa.Schema,
    *,
    config: Mapping[str, Any],
    shards: int,
    overwrite: bool = False,
) -> ShardedDataset:
    """Creates a dataset, or resumes one with the same fingerprint; see `ShardedDataset` for the arguments.

    If `overwrite` is set, an existing dataset in the folder is deleted first.

    Raises:
        FingerprintError: the folder holds a dataset with a different fingerprint, and `overwrite` is not set.
        DatasetError: the folder holds files that captionlib did not write.
    """
    folder = Folder(uri)
    config = json.loads(json.dumps(config))
    dataset = ShardedDataset(folder, kind, config, compute_fingerprint(kind, config), shards, schema)
    existing = _read_description(folder)
    if existing is None:
        if others := [name for name in folder.list() if name != TEMPORARY_FOLDER]:
            raise DatasetError(
                f"{folder.uri} holds files that captionlib did not write ({', '.join(others[:3])}); "
                "use a new or empty folder"
            )
    elif overwrite:
        _clear(folder)
    elif existing["fingerprint"] == dataset.fingerprint:
        return dataset
    else:
        lines = describe_differences({"kind": existing["kind"], **existing["config"]}, {"kind": kind, **config})
        raise FingerprintError(
            f"{folder.uri} holds the output of a different configuration ({'; '.join(lines) or 'schema version'}); "
            "use another folder, or --overwrite to replace it"
        )
    description = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "fingerprint": dataset.fingerprint,
        "shards": shards,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "columns": {column.name: str(column.type) for column in schema},
        "config": config,
        "arrow_schema": schema.serialize().to_pybytes().hex(),
    }
    folder.write(DESCRIPTION_FILE, to_json(description))
    return dataset


def _clear(folder: Folder) -> None:
    """Deletes a dataset, beginning with `_SUCCESS` and the markers, so an interrupted deletion leaves it incomplete."""
    for name in (SUCCESS_FILE, MARKERS_FOLDER, FAILURES_FOLDER, TEMPORARY_FOLDER):
        folder.remove(name)
    for name in folder.list():
        if name.startswith("part-") and name.endswith(".parquet"):
            folder.remove(name)
    folder.remove(DESCRIPTION_FILE)


def _read_description(folder: Folder) -> dict[str, Any] | None:
    try:
        content = folder.read(DESCRIPTION_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        description: dict[str, Any] = json.loads(content)
        _ = [description[key] for key in ("kind", "schema_version", "fingerprint", "shards", "config", "arrow_schema")]
    except (ValueError, KeyError) as error:
        raise DatasetError(
            f"{folder.address(DESCRIPTION_FILE)} is damaged ({error!r}); write the dataset again"
        ) from error
    return description
