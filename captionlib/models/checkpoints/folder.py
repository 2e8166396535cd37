"""The folder that a trained model is kept in, of whatever kind: whole or not at all, and nothing that runs when loaded.

| file | content |
|---|---|
| `model.safetensors` | the weights |
| `training.json` | how the training went; nothing depends on it |
| `encoder.safetensors` | the weights of an encoder that was tuned with the model; absent where none was |
| `datastore.parquet` | what a captioner remembers of the images it learned from; absent until it is asked to |
| `config.json` | what the model is and where it comes from; written last, with the SHA-256 of the weights |
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from captionlib import __version__
from captionlib.data.shards.markers import compute_fingerprint, to_json
from captionlib.errors import CheckpointError
from captionlib.storage.folders import Folder

__all__ = [
    "CHECKPOINT_FILES",
    "DATASTORE",
    "Checkpoint",
    "FolderLike",
    "damaged",
    "describe_checkpoint",
    "find_encoder_weights",
    "open_folder",
    "read_checkpoint",
    "stamp_provenance",
    "write_checkpoint",
]

FORMAT_VERSION = 2
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TRAINING = "training.json"
ENCODER = "encoder.safetensors"
DATASTORE = "datastore.parquet"
CHECKPOINT_FILES = frozenset({WEIGHTS, CONFIG, TRAINING, ENCODER, DATASTORE})


FolderLike = str | os.PathLike[str] | Folder


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint of any kind.

    Attributes:
        kind: what the model is, such as `captioner`.
        identity: all that its answers depend on besides the weights.
        tensors: the weights, on the CPU.
        provenance: where it comes from.
        training: how its training went.
        fingerprint: the hash of kind, identity and weights: models that answer alike have it in common.
    """

    kind: str
    identity: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any]
    training: Mapping[str, Any]
    fingerprint: str


def write_checkpoint(
    folder: FolderLike,
    kind: str,
    tensors: Mapping[str, Tensor],
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any],
    training: Mapping[str, Any],
    encoder_file: bytes | None = None,
) -> str:
    """Writes a checkpoint of any kind, in place of one that is there.

    All files are written beside their places first and then moved there, the configuration last.

    Args:
        folder: where to.
        kind: what the model is.
        tensors: its weights.
        identity: all else that its answers depend on; plain values.
        provenance: where it comes from; plain values.
        training: how its training went; plain values.
        encoder_file: the weights file of an encoder that was tuned with the model, whose description the identity has.

    Returns:
        The fingerprint.
    """
    # Clones: tied weights share their memory, and safetensors refuses tensors that do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    weights = safetensors.torch.save(copies)
    digest = hashlib.sha256(weights).hexdigest()
    config = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(kind, identity, digest),
        "weights_sha256": digest,
        "provenance": provenance,
        **identity,
    }
    files = {CONFIG: to_json(config), TRAINING: to_json(training), ENCODER: encoder_file, WEIGHTS: weights}
    target = open_folder(folder)
    with ExitStack() as stack:  # left from the last to the first
        for name, content in files.items():
            if content is not None:
                stack.enter_context(target.stage(name)).write_bytes(content)
    for name in (DATASTORE, *([ENCODER] if encoder_file is None else [])):
        target.remove(name)  # of a checkpoint that was there
    return str(config["fingerprint"])


def find_encoder_weights(folder: FolderLike, description: Mapping[str, Any]) -> str | None:
    """The address of the weights of an encoder that was tuned with the model; None where none was.

    Args:
        folder: the checkpoint.
        description: of the model's encoder.
    """
    source = open_folder(folder)
    return source.address(ENCODER) if description.get("weights") == "file" and source.exists(ENCODER) else None


def stamp_provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model comes from, with the versions that made it and the date."""
    return {
        **provenance,
        "captionlib": __version__,
        "torch": torch.__version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_checkpoint(folder: FolderLike, kind: str) -> Checkpoint:
    """Reads a checkpoint of a kind, and checks that it is whole.

    Raises:
        CheckpointError: there is none, it is damaged, or it is something else.
    """
    source = open_folder(folder)
    config = _read_json(source, CONFIG)
    if config is None:
        raise CheckpointError(f"{source.uri} is no checkpoint: expected a folder that holds {CONFIG} and {WEIGHTS}")
    if config.get("kind") != kind or "format_version" not in config:
        got = config.get("kind", "another program's")
        raise CheckpointError(f"{source.uri}: expected a checkpoint of kind {kind}, got {got}")
    if config["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{source.uri}: expected format version {FORMAT_VERSION}, got {config['format_version']}; "
            "load it with the version of captionlib that wrote it, or train again"
        )
    try:
        fingerprint, recorded = config.pop("fingerprint"), config.pop("weights_sha256")
        provenance = config.pop("provenance")
        weights = source.read(WEIGHTS)
    except KeyError as error:
        raise damaged(source, f"{CONFIG} lacks {error}") from error
    except FileNotFoundError as error:
        raise damaged(source, f"{WEIGHTS} is missing") from error
    identity = {name: value for name, value in config.items() if name not in ("kind", "format_version")}
    digest = hashlib.sha256(weights).hexdigest()
    if digest != recorded:
        raise damaged(source, f"expected {WEIGHTS} of SHA-256 {recorded}, got {digest}")
    if _fingerprint(kind, identity, digest) != fingerprint:
        raise damaged(source, f"{CONFIG} is not what its fingerprint was taken of")
    try:
        tensors = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise damaged(source, f"{WEIGHTS} cannot be read: {error}") from error
    return Checkpoint(kind, identity, tensors, provenance, _read_json(source, TRAINING) or {}, fingerprint)


def describe_checkpoint(folder: FolderLike) -> dict[str, Any]:
    """A checkpoint of any kind, for people: its configuration without the vocabulary, its best epoch, its memory.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    source = open_folder(folder)
    config = _read_json(source, CONFIG)
    if config is None or "fingerprint" not in config:
        raise CheckpointError(f"{source.uri} is no checkpoint of captionlib; expected {CONFIG} and {WEIGHTS}")
    vocabulary = config.pop("vocabulary", {})
    training = _read_json(source, TRAINING) or {}
    history = training.get("history", [])
    words = f"{len(vocabulary.get('words', [])):,} {vocabulary.get('level', 'words')}"
    described = {**config, "vocabulary": words}
    if source.exists(DATASTORE):
        with source.open(DATASTORE) as file:
            described["datastore"] = f"{pq.read_metadata(file).num_rows:,} images"
    return {**described, "epoch": history[-1]} if history else described


def _read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads(folder.read(name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise damaged(folder, f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise damaged(folder, f"{name}: expected a mapping, got {type(content).__name__}")
    return content


def _fingerprint(kind: str, identity: Mapping[str, Any], weights_sha256: str) -> str:
    return compute_fingerprint(kind, {**identity, "weights_sha256": weights_sha256})


def open_folder(folder: FolderLike) -> Folder:
    """The folder at an address, or the folder itself."""
    return folder if isinstance(folder, Folder) else Folder(folder)


def damaged(folder: Folder, reason: str) -> CheckpointError:
    """The error to raise for a checkpoint that is not what it should be."""
    return CheckpointError(f"checkpoint {folder.uri} is damaged: {reason}; copy it again, or train again")
