"""Reads and writes the files of a checkpoint. Each file is written atomically. Loading never executes code.

| file | content |
|---|---|
| `model.safetensors` | the weights |
| `training.json` | the training configuration and history; informative only |
| `README.md` | the model card: data, training configuration and scores; informative only |
| `encoder.safetensors` | the weights of the encoder, if training fine-tuned them or an export added them |
| `datastore.parquet` | features and references of training images for reranking, from `captionlib build-datastore` |
| `config.json` | architecture, vocabulary, encoder and provenance; written last, with the SHA-256 of the weights |
"""

import hashlib
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
from captionlib.data.shards.markers import compute_fingerprint, from_json_with_checksum, to_json, to_json_with_checksum
from captionlib.errors import CheckpointError
from captionlib.models.checkpoints.encoder_file import CONFIG, ENCODER, WEIGHTS, not_a_checkpoint_error
from captionlib.models.checkpoints.model_card import CARD, describe_vocabulary, render_card
from captionlib.storage.folders import Folder

__all__ = [
    "CHECKPOINT_FILES",
    "DATASTORE",
    "WEIGHTS",
    "Checkpoint",
    "FolderLike",
    "add_versions_and_time",
    "damaged_error",
    "describe_checkpoint",
    "open_folder",
    "read_checkpoint",
    "read_config",
    "write_checkpoint",
]

FORMAT_VERSION = 3
TRAINING = "training.json"
DATASTORE = "datastore.parquet"
CHECKPOINT_FILES = frozenset({WEIGHTS, CONFIG, TRAINING, ENCODER, DATASTORE, CARD})

FolderLike = str | os.PathLike[str] | Folder


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint of any kind.

    Attributes:
        kind: kind of model, such as `captioner`.
        identity: what determines the model's output apart from the weights, such as architecture and vocabulary.
        tensors: the weights, on the CPU.
        provenance: the data and versions that the model was trained with.
        training: the training configuration and history.
        fingerprint: hash of kind, identity and weights, which together determine the model's output.
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
    encoder_weights: bytes | None = None,
) -> str:
    """Writes a checkpoint and returns its fingerprint. A checkpoint that is already in the folder is replaced.

    If the encoder was fine-tuned with the model, `encoder_weights` is the content of its weights file.
    """
    # Cloned because safetensors rejects tensors that share memory, as tied weights do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    weights = safetensors.torch.save(copies)
    digest = hashlib.sha256(weights).hexdigest()
    fingerprint = _fingerprint(kind, identity, digest)
    config = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "weights_sha256": digest,
        "provenance": provenance,
        **identity,
    }
    files = {
        CONFIG: to_json_with_checksum(config),
        TRAINING: to_json(training),
        CARD: render_card(config, training, has_encoder=encoder_weights is not None),
        ENCODER: encoder_weights,
        WEIGHTS: weights,
    }
    target = open_folder(folder)
    with ExitStack() as stack:  # the files are renamed in reverse order, CONFIG last
        for name, content in files.items():
            if content is not None:
                stack.enter_context(target.stage(name)).write_bytes(content)
    for name in (DATASTORE, *([ENCODER] if encoder_weights is None else [])):
        target.remove(name)  # belongs to the previous checkpoint
    return fingerprint


def add_versions_and_time(provenance: Mapping[str, Any]) -> dict[str, Any]:
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**provenance, "captionlib": __version__, "torch": torch.__version__, "written": written}


def read_checkpoint(folder: FolderLike, kind: str) -> Checkpoint:
    """Reads and verifies a checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of a different kind.
    """
    source = open_folder(folder)
    config = read_config(source)
    if config.get("kind") != kind:
        got = config.get("kind", "one of unknown kind")
        raise CheckpointError(f"{source.uri}: expected a checkpoint of kind {kind}, got {got}")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{source.uri}: expected format version {FORMAT_VERSION}, got {config.get('format_version')}; "
            "load it with the version of captionlib that wrote it, or train again"
        )
    try:
        fingerprint, recorded_digest = config.pop("fingerprint"), config.pop("weights_sha256")
        provenance = config.pop("provenance")
        weights = source.read(WEIGHTS)
    except KeyError as error:
        raise damaged_error(source, f"{CONFIG} lacks {error}") from error
    except FileNotFoundError as error:
        raise damaged_error(source, f"{WEIGHTS} is missing") from error
    identity = {name: value for name, value in config.items() if name not in ("kind", "format_version")}
    digest = hashlib.sha256(weights).hexdigest()
    if digest != recorded_digest:
        raise damaged_error(source, f"expected {WEIGHTS} with SHA-256 {recorded_digest}, got {digest}")
    if _fingerprint(kind, identity, digest) != fingerprint:
        raise damaged_error(source, f"{CONFIG} does not match its fingerprint")
    try:
        tensors = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        raise damaged_error(source, f"{WEIGHTS} cannot be read: {error}") from error
    return Checkpoint(kind, identity, tensors, provenance, _read_json(source, TRAINING) or {}, fingerprint)


def describe_checkpoint(folder: FolderLike) -> dict[str, Any]:
    """Summarizes a checkpoint of any kind: its configuration, vocabulary, datastore, and metrics of the saved epoch.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
    """
    source = open_folder(folder)
    config = read_config(source)
    if "fingerprint" not in config:
        raise not_a_checkpoint_error(source)
    vocabulary = config.pop("vocabulary", {})
    training = _read_json(source, TRAINING) or {}
    history = training.get("history", [])
    description = {**config, "vocabulary": describe_vocabulary(vocabulary)}
    if source.exists(DATASTORE):
        with source.open(DATASTORE) as file:
            description["datastore"] = f"{pq.read_metadata(file).num_rows:,} images"
    return {**description, "epoch": history[-1]} if history else description


def open_folder(folder: FolderLike) -> Folder:
    return folder if isinstance(folder, Folder) else Folder(folder)


def damaged_error(folder: Folder, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder.uri} is damaged: {reason}; copy it again, or train again")


def read_config(folder: Folder) -> dict[str, Any]:
    """Returns the content of `config.json`. The weights are not verified.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    config = _read_json(folder, CONFIG)
    if config is None:
        raise not_a_checkpoint_error(folder)
    return config


def _read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    try:
        return from_json_with_checksum(folder.read(name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise damaged_error(folder, f"{name}: {error}") from error


def _fingerprint(kind: str, identity: Mapping[str, Any], weights_sha256: str) -> str:
    return compute_fingerprint(kind, {**identity, "weights_sha256": weights_sha256})
