"""Datasets as folders of shards, each of which is there whole or not at all.

    folder/
      part-00000.parquet ...          rows; at the top level there are only complete files
      _dataset.json                   what it is and what made it (kind, schema version, configuration, fingerprint)
      _shards/part-00000.json ...     a marker a shard, written last: with it the shard is done
      _failures/part-00000.parquet    the images of a shard that could not be had; absent where there are none
      _SUCCESS                        the totals, once every shard is done

A shard's files appear in the order data, failures, marker. Whoever dies in between leaves a shard without a marker,
which the next run does again.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from captionlib.errors import DatasetError, FailureRatioError, FingerprintError
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["ShardedDataset", "create_dataset", "open_dataset"]


@dataclass(frozen=True)
class ShardedDataset:
    """A dataset in a folder. Pickles to an address and a description, so it travels to workers.

    Attributes:
        folder: where it is.
        kind: what a row is: manifest, features, captions or embeddings.
        config: all that the rows depend on.
        fingerprint: the hash of kind, schema version and config.
        shards: how many parts it has when it is complete.
        schema: the Arrow schema of its parts.
    """

    folder: Folder
    kind: str
    config: Mapping[str, Any]
    fingerprint: str
    shards: int
    schema: pa.Schema

    def done_shards(self) -> set[int]:
        """The shards that have a marker, by one listing."""
        names = (name for name in self.folder.list(MARKERS_FOLDER) if name.endswith(".json"))
        found = {int(name.removeprefix("part-").removesuffix(".json")) for name in names}
        return {shard for shard in found if shard < self.shards}

    def pending_shards(self) -> list[int]:
        """The shards that are still to be done."""
        return sorted(set(range(self.shards)) - self.done_shards())

    def read_marker(self, shard: int) -> Marker | None:
        """The marker of a shard, None where it is not done."""
        try:
            content = self.folder.read(f"{MARKERS_FOLDER}/{part_name(shard)}.json")
        except FileNotFoundError:
            return None
        marker = Marker(**json.loads(content))
        return marker if marker.fingerprint == self.fingerprint else None

    def read_markers(self, shards: Iterable[int] | None = None) -> dict[int, Marker]:
        """The markers of these shards, or of all that are done."""
        return {marker.shard: marker for marker in self.iter_markers(self.done_shards() if shards is None else shards)}

    def iter_markers(self, shards: Iterable[int]) -> Iterator[Marker]:
        """The markers of these shards in any order, fetched concurrently; memory holds some of them."""
        for content in self.folder.read_many(f"{MARKERS_FOLDER}/{part_name(shard)}.json" for shard in sorted(shards)):
            marker = Marker(**json.loads(content))
            if marker.fingerprint == self.fingerprint:
                yield marker

    def compute_totals(self) -> Totals:
        """Of all the shards that are done, by reading all of their markers."""
        return sum_markers(self.iter_markers(self.done_shards()))

    def read_totals(self) -> Totals | None:
        """What `_SUCCESS` tells; None where it is not there."""
        try:
            content = json.loads(self.folder.read(SUCCESS_FILE))
        except FileNotFoundError:
            return None
        return Totals(**content) if content.pop("fingerprint") == self.fingerprint else None

    def is_complete(self) -> bool:
        return self.folder.exists(SUCCESS_FILE)

    def mark_incomplete(self) -> None:
        """Says that shards are going to be written: until `finish` the dataset is not complete."""
        self.folder.remove_file(SUCCESS_FILE)

    def require_complete(self) -> "ShardedDataset":
        """Itself.

        Raises:
            DatasetError: some of its shards are not done.
        """
        if not self.is_complete():
            raise DatasetError(
                f"{self.folder.uri} is not complete: expected {self.shards} shards, {len(self.done_shards())} are done, "
                "or the last run ended with too many failures; run the command that writes it again"
            )
        return self

    def part_path(self, shard: int) -> str:
        """The path of a shard's data, as the folder's file system spells it."""
        return self.folder.path(f"{part_name(shard)}.parquet")

    def read(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole shard."""
        with self.folder.open(f"{part_name(shard)}.parquet") as file:
            return pq.read_table(file, columns=list(columns) if columns is not None else None)

    def read_batches(
        self, shard: int, columns: Sequence[str] | None = None, batch_size: int = 256
    ) -> Iterator[pa.RecordBatch]:
        """A shard in pieces of `batch_size` rows; memory holds one row group."""
        with self.folder.open(f"{part_name(shard)}.parquet") as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)  # the columns of a row group come by a request or two
            for group in range(parquet.num_row_groups):
                yield from parquet.iter_batches(
                    batch_size, row_groups=[group], columns=list(columns) if columns is not None else None
                )

    def read_failures(self, shard: int) -> pa.Table | None:
        """The failures of a shard, None where there are none."""
        name = f"{FAILURES_FOLDER}/{part_name(shard)}.parquet"
        if not self.folder.exists(name):
            return None
        with self.folder.open(name) as file:
            return pq.read_table(file)

    def remove_marker(self, shard: int) -> None:
        """Takes a shard's marker away: until it is written again, neither shard nor dataset is done."""
        self.mark_incomplete()
        self.folder.remove_file(f"{MARKERS_FOLDER}/{part_name(shard)}.json")

    def finish(self, max_failure_ratio: float = 1.0) -> Totals:
        """Checks that every shard is done and writes `_SUCCESS`, unless it is there.

        Raises:
            DatasetError: a shard is missing.
            FailureRatioError: more than `max_failure_ratio` of the images failed.
        """
        recorded = None if self.pending_shards() else self.read_totals()
        totals = recorded or self.compute_totals()
        if totals.shards < self.shards:
            missing = sorted(set(range(self.shards)) - set(self.read_markers()))
            raise DatasetError(
                f"{self.folder.uri}: expected {self.shards} shards, {len(missing)} are not done "
                f"(the first is {part_name(missing[0])}); run the command again, it goes on where it stopped"
            )
        if totals.failures > max_failure_ratio * totals.images:
            self.mark_incomplete()
            raise FailureRatioError(_describe_failures(self, totals, max_failure_ratio))
        if recorded is None:
            self.folder.write(SUCCESS_FILE, to_json({**asdict(totals), "fingerprint": self.fingerprint}))
            self.folder.remove(TEMPORARY_FOLDER)
        return totals

    def verify(self) -> list[str]:
        """What is wrong with the parts that are done, a line each: missing, or other than their marker says."""
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


def _describe_failures(dataset: ShardedDataset, totals: Totals, max_failure_ratio: float) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in totals.reasons.items())
    return (
        f"{dataset.folder.uri}: {totals.failures} of {totals.images} images failed "
        f"({totals.failures / totals.images:.1%}, allowed {max_failure_ratio:.1%}; {reasons}). All rows are kept: "
        f"see {FAILURES_FOLDER}/, then run again with --retry-failures, or with a higher --max-failure-ratio"
    )


def open_dataset(uri: str | os.PathLike[str], kind: str | None = None) -> ShardedDataset:
    """Opens a dataset, complete or not.

    Raises:
        DatasetError: there is none, it is of another kind, or of another schema version.
    """
    folder = Folder(uri)
    description = _read_description(folder)
    if description is None:
        got = "other files" if folder.list() else "no such folder, or an empty one"
        raise DatasetError(
            f"{folder.uri} is no dataset of captionlib: expected a folder that holds {DESCRIPTION_FILE}, got {got}; "
            "give the output of the stage before"
        )
    if kind is not None and description["kind"] != kind:
        raise DatasetError(
            f"{folder.uri}: expected a dataset of kind {kind}, got {description['kind']}; "
            "`captionlib --help` tells what each stage reads"
        )
    if description["schema_version"] != SCHEMA_VERSION:
        raise DatasetError(
            f"{folder.uri}: expected schema version {SCHEMA_VERSION}, got {description['schema_version']}; "
            "write it again with this version of captionlib"
        )
    return ShardedDataset(
        folder=folder,
        kind=description["kind"],
        config=description["config"],
        fingerprint=description["fingerprint"],
        shards=description["shards"],
        schema=pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(description["arrow_schema"]))),
    )


def create_dataset(
    uri: str | os.PathLike[str],
    kind: str,
    schema: pa.Schema,
    *,
    config: Mapping[str, Any],
    shards: int,
    overwrite: bool = False,
) -> ShardedDataset:
    """Starts a dataset, or goes on with one of the same fingerprint.

    Raises:
        FingerprintError: the folder holds a dataset of another configuration, and `overwrite` is off.
        DatasetError: the folder holds files that are not captionlib's.
    """
    folder = Folder(uri)
    config = json.loads(json.dumps(config))
    dataset = ShardedDataset(folder, kind, config, compute_fingerprint(kind, config), shards, schema)
    existing = _read_description(folder)
    if existing is not None and existing["fingerprint"] == dataset.fingerprint and not overwrite:
        return dataset
    if existing is not None and not overwrite:
        raise FingerprintError(_describe_difference(folder, existing, kind, config))
    if existing is None and (strangers := [name for name in folder.list() if name != TEMPORARY_FOLDER]):
        raise DatasetError(
            f"{folder.uri} holds files that captionlib did not write ({', '.join(strangers[:3])}); "
            "give an empty or a new folder"
        )
    if existing is not None:
        _clear(folder)
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
    """Removes a dataset, the marks of completeness first and the description last."""
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


def _describe_difference(folder: Folder, existing: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> str:
    lines = describe_differences({"kind": existing["kind"], **existing["config"]}, {"kind": kind, **config})
    return (
        f"{folder.uri} holds the output of another configuration ({'; '.join(lines) or 'another schema version'}); "
        "give another folder, or --overwrite to replace it"
    )
