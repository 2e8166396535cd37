"""Datasets: folders of Parquet shards, each of which is either complete or absent.

    folder/
      part-00000.parquet ...          rows; only complete files appear at the top level
      _dataset.json                   description: kind, schema, configuration, and a hash of them (fingerprint)
      __shards/part-00000.json ...    markers: JSON files, each of which records that a shard is complete
      __failures/part-00000.parquet   images of the shard that could not be read; absent if there are none
      _SUCCESS                        totals over all shards; written once all are finished
      _removed.json                   hashes of the ids of images that `captionlib remove` removed
      __sample/                       sample of the input, while a stage with --limit runs
      __update/, _update.json         new shards and journal of an update; see `captionlib.data.shards.update`

The files of a shard are written in the order data, failures, marker. If the writer dies in between, the shard has no
marker, and the next run writes it again. Other libraries ignore the names that begin with `_`.
"""

import io
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captionlib.config import describe_differences
from captionlib.data.shards.markers import (
    DESCRIPTION_FILE,
    FAILURES_FOLDER,
    JOURNAL_FILE,
    MARKERS_FOLDER,
    PROGRESS_EXTENSION,
    REMOVED_FILE,
    SAMPLE_FOLDER,
    SUCCESS_FILE,
    UPDATE_FOLDER,
    Marker,
    ShardProgress,
    Totals,
    compute_checksum,
    compute_fingerprint,
    data_file,
    decode_marker,
    decode_progress,
    decode_totals,
    failures_file,
    from_json_with_checksum,
    marker_file,
    parse_time,
    part_name,
    progress_file,
    read_marker,
    sum_markers,
    to_json_with_checksum,
)
from captionlib.data.shards.schemas import FAILURES_SCHEMA, SCHEMA_VERSIONS, add_missing_columns, upgrade_schema
from captionlib.data.shards.verification import VerifiedFile
from captionlib.errors import (
    ConfigError,
    DamagedShardError,
    DatasetError,
    FailureRatioError,
    FingerprintError,
    StorageError,
)
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder, resolve_address
from captionlib.storage.lock import LOCK_FILE

__all__ = ["ShardedDataset", "create_dataset", "open_dataset", "select_other_files"]

_PART = re.compile(r"part-([0-9]+)")


@dataclass(frozen=True)
class ShardedDataset:
    """A dataset in a folder.

    Attributes:
        folder: folder of the dataset.
        kind: manifest (images and reference captions), features, captions (generated), embeddings or duplicates.
        config: everything that determines the rows, except for the input.
        fingerprint: hash of kind, schema version and config.
        shards: number of shards of the complete dataset.
        schema: Arrow schema of the shards.
        manifest_id: id of the manifest that the images come from. It stays the same when the manifest is updated.
        source: path or URL of the dataset that this dataset was made from most recently; empty if there is none.
        compaction_id: id of the compaction (see `captionlib.data.shards.compaction`) that divided the images into these
            shards; empty if there was none. It equals that of the source.
        source_checksum: content checksum of the source when this dataset was created; empty if unknown.
        encoder_weights: path or URL of the weights file of the encoder that computed the features; empty if there is no
            such file. The fingerprint depends on a hash of the weights, not on this path.
        created: when the dataset was created, as an ISO 8601 time in UTC. Empty if it has just been created.
    """

    folder: Folder
    kind: str
    config: Mapping[str, Any]
    fingerprint: str
    shards: int
    schema: pa.Schema
    manifest_id: str
    source: str = ""
    compaction_id: str = ""
    source_checksum: str = ""
    encoder_weights: str = ""
    created: str = field(default="", compare=False)

    def list_written_shards(self) -> set[int]:
        """Returns the numbers of the shards that have a marker and a data file.

        This lists the folders, but does not read the markers, so some of these shards may not be finished.
        """
        return self._list_parts(MARKERS_FOLDER, ".json") & self.list_stored_shards()

    def list_stored_shards(self) -> set[int]:
        """Returns the numbers of the shards that have a data file, finished or not."""
        return self._list_parts("", ".parquet")

    def read_progress(self, shards: Iterable[int]) -> dict[int, ShardProgress]:
        """Returns the progress by shard, for unfinished shards whose worker has reported it."""
        listed = sorted(self._list_parts(MARKERS_FOLDER, PROGRESS_EXTENSION) & set(shards))
        reported = {}
        for content in self.folder.read_many(map(progress_file, listed)):
            with suppress(ValueError):  # damaged
                progress = decode_progress(content)
                reported[progress.shard] = progress
        return reported

    def remove_progress(self) -> None:
        """Removes the files that `read_progress` reads, such as those of killed runs."""
        for shard in self._list_parts(MARKERS_FOLDER, PROGRESS_EXTENSION):
            self.folder.remove_file(progress_file(shard))

    def _list_parts(self, subfolder: str, extension: str) -> set[int]:
        names = (name.removesuffix(extension) for name in self.folder.list(subfolder) if name.endswith(extension))
        numbers = {
            int(match[1]) for name in names if (match := _PART.fullmatch(name)) and name == part_name(int(match[1]))
        }
        return {shard for shard in numbers if shard < self.shards}

    def pending_shards(self) -> list[int]:
        """Returns the sorted numbers of the unfinished shards."""
        return sorted(set(range(self.shards)) - self.read_markers().keys())

    def read_marker(self, shard: int) -> Marker | None:
        """Returns the marker of a shard, or None if the shard is not finished."""
        marker = self.read_marker_even_if_unfinished(shard)
        finished = marker is not None and marker.previous is None
        return marker if finished and self.folder.exists(data_file(shard)) else None

    def read_markers(self, shards: Iterable[int] | None = None) -> dict[int, Marker]:
        """Returns the markers of the finished shards among `shards` (all shards if None), by shard."""
        written = self.list_written_shards()
        selected = written if shards is None else written & set(shards)
        return {marker.shard: marker for marker in self.iter_markers(selected)}

    def require_markers(self) -> dict[int, Marker]:
        """Returns the markers of the finished shards, by shard.

        Use this instead of `read_markers` where no shard of a complete dataset may be skipped.

        Raises:
            DamagedShardError: the dataset is complete, but a marker is missing or damaged.
        """
        markers = self.read_markers()
        missing = set(range(self.shards)) - markers.keys()
        if missing and self.is_complete():
            raise self._damaged(data_file(min(missing)), "its marker is missing")
        return markers

    def require_all_markers(self) -> dict[int, Marker]:
        """Returns the markers of all shards, by shard.

        Raises:
            DatasetError: the dataset is not complete, or was removed.
            DamagedShardError: the dataset is complete, but a marker is missing or damaged.
        """
        markers = self.read_markers()
        if missing := set(range(self.shards)) - markers.keys():
            self.require_complete()
            raise self._damaged(data_file(min(missing)), "its marker is missing")
        return markers

    def iter_markers(self, shards: Iterable[int]) -> Iterator[Marker]:
        """Yields the markers of the finished shards among `shards`, in any order. All `shards` must have data files.

        A shard counts as unfinished if its marker is damaged or has a different fingerprint.
        """
        wanted = set(shards)
        for content in self.folder.read_many(map(marker_file, sorted(wanted))):
            with suppress(ValueError):  # damaged
                marker = decode_marker(content)
                if marker.fingerprint == self.fingerprint and marker.previous is None and marker.shard in wanted:
                    yield marker

    def read_marker_even_if_unfinished(self, shard: int) -> Marker | None:
        """Returns the marker of a shard, or None if it has none.

        While the files of the shard are being replaced, the attribute `previous` of its marker is set.
        """
        marker = read_marker(self.folder, marker_file(shard))
        is_own = marker is not None and marker.fingerprint == self.fingerprint and marker.shard == shard
        return marker if is_own else None

    def compute_totals(self) -> Totals:
        """Sums the markers of all finished shards."""
        return sum_markers(self.iter_markers(self.list_written_shards()))

    def read_totals(self) -> Totals | None:
        """Returns the totals in `_SUCCESS`, or None if the dataset is not complete."""
        try:
            totals, fingerprint = decode_totals(self.folder.read(SUCCESS_FILE))
        except (FileNotFoundError, ValueError):
            return None
        return totals if fingerprint == self.fingerprint and totals.shards == self.shards else None

    def compute_content_checksum(self) -> str:
        """Returns a hash of the rows of a complete dataset. It changes when any row changes."""
        totals = self.read_totals()
        return totals.checksum if totals is not None and totals.checksum else self.compute_totals().checksum

    def is_complete(self) -> bool:
        """Returns whether all shards are finished and the dataset is marked as complete."""
        return self.read_totals() is not None

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
        again = "rerun the command that writes this dataset"
        if totals.shards < self.shards:
            return f"expected {self.shards} finished shards, got {totals.shards}; {again}"
        if not totals.failures:
            return f"its {self.shards} shards are finished, but {SUCCESS_FILE} was not written; {again}"
        return (
            f"{totals.describe_failures()}, more than the run allowed; {again} with a higher --max-failure-ratio to "
            f"accept the failures (1 accepts all), or with --retry-failures to read these images again"
        )

    def get_part_path(self, shard: int) -> str:
        """Returns the path of a shard's data file within its file system."""
        return self.folder.path(data_file(shard))

    def read(self, shard: int, columns: Sequence[str] | None = None, marker: Marker | None = None) -> pa.Table:
        """Reads a shard into memory; see `read_batches`."""
        return pa.Table.from_batches(self.read_batches(shard, columns, 1 << 30, marker), self._select(columns))

    def read_batches(
        self,
        shard: int,
        columns: Sequence[str] | None = None,
        batch_size: int = 256,
        marker: Marker | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yields the rows of a shard in batches of up to `batch_size`. Holds one row group in memory.

        All bytes are compared with the checksums in the marker. If the shard is replaced before the first batch, its
        new version is read.

        Args:
            shard: number of the shard.
            columns: the columns to read, which are returned in schema order. If None, all are read.
            batch_size: maximum number of rows in a batch.
            marker: marker of the version to read. If None, the current version is read.

        Raises:
            DamagedShardError: the data file or its marker is missing or damaged, or the file does not match the marker.
            DatasetError: the shard was replaced after the first batch.
        """
        name, schema = data_file(shard), self._select(columns)
        expected, started, attempts = marker or self.read_marker_even_if_unfinished(shard), False, 0
        while expected is not None:
            try:
                file = VerifiedFile(self.folder.fs, self.folder.path(name), expected.versions)
                parquet = pq.ParquetFile(file, pre_buffer=True)  # reads a row group's columns with few requests
                for group in range(parquet.num_row_groups):
                    for rows in parquet.iter_batches(batch_size, row_groups=[group], columns=schema.names):
                        yield add_missing_columns(rows, schema)
                        started = True
                return
            except (DamagedShardError, FileNotFoundError, pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and error.errno is not None:
                    raise  # the storage failed
                current = self.read_marker_even_if_unfinished(shard)
                attempts = attempts + 1 if current == expected else 0
                if marker is not None or attempts == len(list(expected.versions)):  # all versions were tried
                    raise self._damaged(
                        name, "missing" if isinstance(error, FileNotFoundError) else str(error)
                    ) from error
                if started:
                    raise DatasetError(
                        f"{self.folder.address(name)} was replaced while it was being read; run the command again"
                    ) from error
                expected = current
        raise self._damaged(name, "its marker is missing")

    def _damaged(self, name: str, reason: str) -> DamagedShardError:
        can_verify = self.source and self.kind != "duplicates"
        remedy = "--verify, which writes damaged shards again" if can_verify else "--overwrite"
        return DamagedShardError(
            f"{self.folder.address(name)} is damaged ({reason}); rerun the command that writes {self.folder.uri} "
            f"with {remedy}"
        )

    def _select(self, columns: Sequence[str] | None) -> pa.Schema:
        return self.schema if columns is None else pa.schema([each for each in self.schema if each.name in columns])

    def read_failures(self, shard: int) -> pa.Table | None:
        """Returns the images of a shard that could not be read, or None if there are none.

        Raises:
            DamagedShardError: the file is missing or damaged.
        """
        marker = self.read_marker_even_if_unfinished(shard)
        while True:
            try:
                return None if marker is None else self._read_failures(shard, list(marker.versions))
            except DamagedShardError:
                current = self.read_marker_even_if_unfinished(shard)
                if current == marker:
                    raise
                marker = current  # the shard was replaced meanwhile

    def _read_failures(self, shard: int, versions: Sequence[Marker]) -> pa.Table | None:
        checksums = {version.failures_checksum for version in versions if version.failures}
        if not checksums:
            return None
        name = failures_file(shard)
        try:
            content = self.folder.read(name)
            if "" not in checksums and compute_checksum(io.BytesIO(content)) not in checksums:
                raise self._damaged(name, "its checksum differs from the marker")
            # A process that exits soon after Arrow has started threads may crash, so Arrow does not use threads here.
            table = pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)
        except FileNotFoundError:
            if not all(version.failures for version in versions):
                return None
            raise self._damaged(name, "missing") from None
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(name, str(error)) from error
        return pa.Table.from_batches([add_missing_columns(rows, FAILURES_SCHEMA) for rows in table.to_batches()])

    def remove_marker(self, shard: int) -> None:
        """Removes the marker of a shard, so that the shard is unfinished and the dataset incomplete."""
        self.mark_incomplete()
        self.folder.remove_file(marker_file(shard))

    def remove_shard(self, shard: int) -> None:
        """Removes the files of a shard, its marker first. The dataset becomes incomplete."""
        self.remove_marker(shard)
        self.folder.remove_file(failures_file(shard))
        self.folder.remove_file(data_file(shard))

    def finish(self, max_failure_ratio: float | None = None) -> Totals:
        """Checks that all shards are finished and writes `_SUCCESS`.

        Raises:
            DatasetError: a shard is not finished, or the folder was removed meanwhile.
            FailureRatioError: more than the fraction `max_failure_ratio` of the images could not be read. If it is
                None, the error is raised only if no image could be read.
        """
        totals = self.compute_totals()
        if totals.shards < self.shards:
            pending = self.pending_shards()  # may be empty: another process can finish a shard meanwhile
            first = f" (the first missing shard is {part_name(pending[0])})" if pending else ""
            raise DatasetError(
                f"{self.folder.uri}: expected {self.shards} finished shards, got {totals.shards}{first}; "
                "run the command again to resume it"
            )
        if totals.exceeds(max_failure_ratio):
            self.mark_incomplete()
            limit = "at least one readable image" if max_failure_ratio is None else f"at most {max_failure_ratio:.1%}"
            raise FailureRatioError(
                f"{self.folder.uri}: {totals.describe_failures()}; expected {limit}. The finished shards are kept; see "
                f"{FAILURES_FOLDER}/, then run again with --retry-failures, or with a higher --max-failure-ratio "
                "(1 accepts all failures)"
            )
        if self.read_totals() != totals:
            self.folder.write(SUCCESS_FILE, to_json_with_checksum({**asdict(totals), "fingerprint": self.fingerprint}))
            with suppress(StorageError):  # these files are harmless if they remain
                self.folder.remove_temporary_files()
                self.remove_progress()
        if not self.folder.exists(DESCRIPTION_FILE):
            raise DatasetError(
                f"{self.folder.uri} was removed or moved while it was being written; run the command again"
            )
        return totals

    def verify(self) -> list[str]:
        """Compares all files of finished shards with their markers. Returns a line for each file that differs."""
        return [
            problem
            for shard in sorted(self._list_parts(MARKERS_FOLDER, ".json"))
            for problem in self.find_damage(shard)
        ]

    def find_damage(self, shard: int) -> list[str]:
        """Compares the files of a shard with its marker. Returns a line for each file that differs."""
        marker = self.read_marker_even_if_unfinished(shard)
        if marker is None:
            return [f"{part_name(shard)}: its marker is missing or damaged"]
        problems = [problem] if (problem := self.find_data_damage(shard, marker)) else []
        try:
            self.read_failures(shard)
        except DamagedShardError as error:
            problems.append(str(error))
        return problems

    def find_data_damage(self, shard: int, marker: Marker) -> str:
        """Returns how the data file of a shard differs from its marker; empty if it does not."""
        name = data_file(shard)
        try:
            with self.folder.open(name) as file:
                checksum = compute_checksum(file)
        except FileNotFoundError:
            return f"{name}: missing"
        is_intact = any(checksum == version.checksum for version in marker.versions)
        return "" if is_intact else f"{name}: expected {marker.checksum}, got {checksum}"


def open_dataset(
    uri: str | os.PathLike[str], kind: str | None = None, *, complete_update: bool = True
) -> ShardedDataset:
    """Opens a dataset, which may be incomplete.

    Example:
        >>> captions = captionlib.open_dataset("captions", "captions").require_complete()
        >>> captions.read(0, columns=["image_id", "caption"]).num_rows
        26

    Args:
        uri: path or URL of the folder.
        kind: expected kind (manifest, features, captions, embeddings or duplicates). If None, any kind is accepted.
        complete_update: whether to first complete an update that was interrupted after its commit; see
            `captionlib.data.shards.update`.

    Raises:
        DatasetError: the folder is not a dataset, or the dataset has a different kind or schema version.
    """
    folder = Folder(uri)
    description = _read_updated_description(folder) if complete_update else _read_description(folder)
    if description is None:
        got = "other files" if folder.list() else "a missing or empty folder"
        raise DatasetError(
            f"{folder.uri} is not a captionlib dataset: expected a folder with {DESCRIPTION_FILE}, got {got}; "
            "use the output of the previous stage; for a folder of images, run `captionlib prepare` first"
        )
    if kind is not None and description["kind"] != kind:
        raise DatasetError(
            f"{folder.uri}: expected a dataset of kind {kind}, got {description['kind']}; "
            "`captionlib --help` shows what each stage reads"
        )
    version = SCHEMA_VERSIONS[description["kind"]]
    if description["schema_version"] != version:
        raise DatasetError(
            f"{folder.uri}: expected version {version} of the schema of {description['kind']}, got "
            f"{description['schema_version']}; write the dataset again with this version of captionlib"
        )
    return _to_dataset(folder, description)


def create_dataset(
    uri: str | os.PathLike[str],
    kind: str,
    schema: pa.Schema,
    *,
    config: Mapping[str, Any],
    shards: int | None = None,
    source: ShardedDataset | None = None,
    manifest_id: str | None = None,
    encoder_weights: str = "",
    overwrite: bool = False,
) -> ShardedDataset:
    """Creates a dataset, or resumes one with the same fingerprint.

    The number of shards of a resumed dataset may change. Shards that are no longer part of it are removed.

    Args:
        uri: path or URL of the folder.
        kind: manifest, features, captions, embeddings or duplicates.
        schema: Arrow schema of the shards.
        config: everything that determines the rows, except for the input.
        shards: number of shards. If None, the dataset has as many shards as `source`.
        source: the dataset that this one is made from.
        manifest_id: id of the manifest that the images come from. If None, it is copied from `source`; if there is no
            source, it is the fingerprint.
        encoder_weights: path or URL of the weights file of the encoder, if the dataset contains its features.
        overwrite: whether to first delete an existing dataset in the folder.

    Raises:
        ConfigError: `uri` is the folder of `source`.
        FingerprintError: the folder holds a dataset with a different fingerprint or of a different manifest, and
            `overwrite` is not set.
        DatasetError: the folder holds files that captionlib did not write, or a dataset with the shards that `source`
            had before it was compacted.
    """
    folder = Folder(uri)
    config = json.loads(json.dumps(config))
    fingerprint = compute_fingerprint(kind, config)
    uses_source_shards = shards is None
    if shards is None:
        assert source is not None, "the number of shards is unknown"
        shards = source.shards
    manifest_id = manifest_id or (source.manifest_id if source else fingerprint)
    source_address = resolve_address(source.folder.uri) if source else ""
    compaction_id = source.compaction_id if source else ""
    if source is not None and source_address == resolve_address(folder.uri):
        raise ConfigError(f"{folder.uri} is the input of this command; use another folder for the output")
    delete_existing = overwrite and folder.exists(DESCRIPTION_FILE)
    description = None if delete_existing else _read_updated_description(folder) or _prepare_folder(folder)
    if description is not None:
        source_checksum = description.get("source_checksum", "")
    else:
        source_checksum = source.compute_content_checksum() if source else ""
    dataset = ShardedDataset(
        *(folder, kind, config, fingerprint, shards, schema),
        *(manifest_id, source_address, compaction_id, source_checksum, encoder_weights),
    )
    if delete_existing:
        _clear(folder)
    elif description is not None:
        existing = _to_dataset(folder, description)
        _require_same(existing, dataset)
        if uses_source_shards and existing.compaction_id != compaction_id:
            raise DatasetError(
                f"{folder.uri} has the shards that {source_address} had before it was compacted; run `captionlib "
                f"compact {source_address} {folder.uri}` to move the rows to the new shards, then run this command "
                "again"
            )
        dataset = dataset if source else replace(dataset, compaction_id=existing.compaction_id)
        if existing == dataset:
            return dataset
        if existing.shards != dataset.shards:
            dataset.mark_incomplete()
        for shard in range(dataset.shards, existing.shards):
            existing.remove_shard(shard)
    _write_description(dataset, created=(description or {}).get("created"))
    return dataset


def _write_description(dataset: ShardedDataset, created: str | None) -> None:
    content = {
        "kind": dataset.kind,
        "schema_version": SCHEMA_VERSIONS[dataset.kind],
        "fingerprint": dataset.fingerprint,
        "manifest_id": dataset.manifest_id,
        "source": dataset.source,
        "source_checksum": dataset.source_checksum,
        **({"encoder_weights": dataset.encoder_weights} if dataset.encoder_weights else {}),
        "shards": dataset.shards,
        "compaction_id": dataset.compaction_id,
        "created": created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "columns": {column.name: str(column.type) for column in dataset.schema},
        "config": dataset.config,
        "arrow_schema": dataset.schema.serialize().to_pybytes().hex(),
    }
    dataset.folder.write(DESCRIPTION_FILE, to_json_with_checksum(content))


def select_other_files(names: Collection[str]) -> list[str]:
    """Returns the names of files that captionlib did not write, in a folder that contains no dataset."""
    own = {TEMPORARY_FOLDER, SAMPLE_FOLDER, LOCK_FILE, REMOVED_FILE}  # a folder can contain these without a dataset
    own.add(DESCRIPTION_FILE)  # another process may have just created a dataset
    if MARKERS_FOLDER in names:
        own |= set(_list_dataset_files(names))
    return [name for name in names if name not in own]


def _list_dataset_files(names: Iterable[str]) -> list[str]:
    """Selects the data files from `names`, and adds the other files and folders of a dataset; the markers are last."""
    parts = [name for name in names if name.endswith(".parquet") and _PART.fullmatch(name.removesuffix(".parquet"))]
    return [SUCCESS_FILE, JOURNAL_FILE, UPDATE_FOLDER, FAILURES_FOLDER, *parts, MARKERS_FOLDER]


def _prepare_folder(folder: Folder) -> dict[str, Any] | None:
    """Prepares a folder without a description for a new dataset.

    Removes the rest of a dataset that was deleted while a command wrote to it. If another process has just created a
    dataset, returns its description.
    """
    names = folder.list()
    others, has_markers = select_other_files(names), MARKERS_FOLDER in names
    description = _read_updated_description(folder) if others or has_markers else None
    if description is not None:
        return description
    if others:
        raise DatasetError(
            f"{folder.uri} holds files that captionlib did not write ({', '.join(others[:3])}); "
            "use a new or empty folder"
        )
    for name in _list_dataset_files(names) if has_markers else ():
        folder.remove(name)
    return None


def _require_same(existing: ShardedDataset, dataset: ShardedDataset) -> None:
    if existing.fingerprint != dataset.fingerprint:
        lines = describe_differences(
            {"kind": existing.kind, **existing.config}, {"kind": dataset.kind, **dataset.config}
        )
        raise FingerprintError(
            f"{dataset.folder.uri} holds the output of a different configuration "
            f"({'; '.join(lines) or 'schema version'}); use another folder, or --overwrite to replace it"
        )
    if existing.manifest_id != dataset.manifest_id:
        raise FingerprintError(
            f"{dataset.folder.uri} holds the output of a different manifest (expected manifest_id "
            f"{dataset.manifest_id}, got {existing.manifest_id}); use another folder, or --overwrite to "
            "replace it. To add or change images, update the manifest that this output was made from"
        )


def _clear(folder: Folder) -> None:
    """Deletes the files of a dataset, except for its description and `_removed.json`.

    An interruption leaves an incomplete dataset.
    """
    folder.remove(SUCCESS_FILE)
    folder.remove(MARKERS_FOLDER)
    folder.remove_temporary_files()
    for name in _list_dataset_files(folder.list()):
        folder.remove(name)


def _to_dataset(folder: Folder, description: Mapping[str, Any]) -> ShardedDataset:
    try:
        stored = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(description["arrow_schema"])))
        kind, config, fingerprint = description["kind"], description["config"], description["fingerprint"]
        if created := str(description.get("created", "")):
            parse_time(created)
        return ShardedDataset(
            folder,
            kind,
            config,
            fingerprint,
            int(description["shards"]),
            upgrade_schema(kind, stored),
            # The first release stored the id of the manifest as `input` in the configuration.
            description.get("manifest_id") or config.get("input") or fingerprint,
            description.get("source", ""),
            description.get("compaction_id", ""),
            description.get("source_checksum", ""),
            str(description.get("encoder_weights", "")),
            created,
        )
    except (pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged_description(folder, error) from error


def _read_updated_description(folder: Folder) -> dict[str, Any] | None:
    """Reads the description, after completing an update that was interrupted after its commit."""
    description = _read_description(folder)
    if description is None or not folder.exists(JOURNAL_FILE):
        return description
    from captionlib.data.shards.update import complete_update

    complete_update(folder)
    return _read_description(folder)


def _read_description(folder: Folder) -> dict[str, Any] | None:
    try:
        content = folder.read(DESCRIPTION_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        description = from_json_with_checksum(content)
        if description["kind"] not in SCHEMA_VERSIONS:
            raise ValueError(f"unknown kind {description['kind']!r}")
        _ = description["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_description(folder, error) from error
    return description


def _damaged_description(folder: Folder, error: Exception) -> DatasetError:
    return DatasetError(
        f"{folder.address(DESCRIPTION_FILE)} is damaged ({error!r}); write the dataset again with --overwrite"
    )
