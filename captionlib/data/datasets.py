"""Starts datasets, goes on with them, and opens them to read."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from captionlib.config import differences
from captionlib.data.schemas import SCHEMA_VERSION
from captionlib.data.shards import DESCRIPTION, FAILURES, MARKERS, SUCCESS, ShardedDataset, fingerprint_of, to_json
from captionlib.errors import DatasetError, FingerprintError
from captionlib.storage import TEMPORARY, Folder

__all__ = ["create_dataset", "open_dataset"]


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
            f"{folder.uri} is no dataset of captionlib: expected a folder that holds {DESCRIPTION}, got {got}; "
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
    dataset = ShardedDataset(folder, kind, config, fingerprint_of(kind, config), shards, schema)
    existing = _read_description(folder)
    if existing is not None and existing["fingerprint"] == dataset.fingerprint and not overwrite:
        return dataset
    if existing is not None and not overwrite:
        raise FingerprintError(_describe_difference(folder, existing, kind, config))
    if existing is None and (strangers := [name for name in folder.list() if name != TEMPORARY]):
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
    folder.write(DESCRIPTION, to_json(description))
    return dataset


def _clear(folder: Folder) -> None:
    """Removes a dataset, the marks of completeness first and the description last."""
    for name in (SUCCESS, MARKERS, FAILURES, TEMPORARY):
        folder.remove(name)
    for name in folder.list():
        if name.startswith("part-") and name.endswith(".parquet"):
            folder.remove(name)
    folder.remove(DESCRIPTION)


def _read_description(folder: Folder) -> dict[str, Any] | None:
    try:
        content = folder.read(DESCRIPTION)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        description: dict[str, Any] = json.loads(content)
        _ = [description[key] for key in ("kind", "schema_version", "fingerprint", "shards", "config", "arrow_schema")]
    except (ValueError, KeyError) as error:
        raise DatasetError(f"{folder.address(DESCRIPTION)} is damaged ({error!r}); write the dataset again") from error
    return description


def _describe_difference(folder: Folder, existing: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> str:
    lines = differences({"kind": existing["kind"], **existing["config"]}, {"kind": kind, **config})
    return (
        f"{folder.uri} holds the output of another configuration ({'; '.join(lines) or 'another schema version'}); "
        "give another folder, or --overwrite to replace it"
    )
