"""Exports checkpoints: copies that other people can load on other machines."""

import json
import os
from collections.abc import Mapping
from typing import Any

from captionlib.config import describe_differences
from captionlib.data.shards.markers import to_json, to_json_with_checksum
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.checkpoints.encoder_file import (
    CONFIG,
    ENCODER,
    WEIGHTS,
    find_encoder_file,
    missing_encoder_error,
)
from captionlib.models.checkpoints.folder import CHECKPOINT_FILES, DATASTORE, TRAINING, read_checkpoint, read_config
from captionlib.models.checkpoints.model_card import CARD, CardNotes, render_card, strip_paths
from captionlib.models.encoders.encoder import EncoderConfig, pack_encoder_weights
from captionlib.models.families.encoder import open_encoder
from captionlib.models.families.registry import split_address
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder

__all__ = ["export_checkpoint"]


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: str | None = None,
    with_encoder: bool = True,
    with_datastore: bool = False,
    notes: CardNotes = CardNotes(),
) -> list[str]:
    """Copies a checkpoint of any kind to a new folder, without paths of this machine. The fingerprint stays the same.

    Args:
        checkpoint: the folder of the checkpoint.
        output: the folder to write.
        weights: path of the encoder's weights file; required only if the file has moved.
        with_encoder: include the weights of the encoder if they were loaded from a file.
        with_datastore: include the datastore for reranking: features and captions of the training images.
        notes: what the model card says about license, data and scores.

    Returns:
        The names of the written files.

    Raises:
        CheckpointError: `checkpoint` is not a checkpoint or is damaged, or `output` contains other files.
        ConfigError: the encoder's weights file is missing, or has different weights.
    """
    source, target = Folder(checkpoint), Folder(output)
    config = read_config(source)
    verified = read_checkpoint(source, str(config.get("kind")))
    contents: dict[str, bytes] = {}
    if with_encoder and (encoder := _read_encoder(source, config, weights)) is not None:
        contents[ENCODER] = encoder
    if with_datastore:
        if not source.exists(DATASTORE):
            raise CheckpointError(f"{source.uri} has no datastore; leave --with-datastore out, or run build-datastore")
        contents[DATASTORE] = source.read(DATASTORE)
    training = strip_paths(verified.training)
    config["provenance"] = strip_paths(config["provenance"])
    contents |= {
        TRAINING: to_json(training),
        CARD: render_card(config, training, ENCODER in contents, notes),
        WEIGHTS: source.read(WEIGHTS),
        CONFIG: to_json_with_checksum(config),  # written last
    }
    if not _contains(target, contents):
        _clear(target)
        for name, content in contents.items():
            target.write(name, content)
    target.remove_temporary_files()
    return sorted(contents)


def _read_encoder(source: Folder, config: dict[str, Any], weights: str | None) -> bytes | None:
    """Returns the content of the encoder's weights file, or None if the encoder was not loaded from a file."""
    encoder, provenance = config.get("encoder", {}), config["provenance"]
    if encoder.get("weights") != "file":
        if weights is not None:
            raise ConfigError(f"--weights: the encoder of {source.uri} was not loaded from a file; leave --weights out")
        return None
    file = weights or find_encoder_file(source, encoder, provenance)
    if file is None:
        raise missing_encoder_error(encoder, provenance)
    if file == source.address(ENCODER):
        return source.read(ENCODER)
    encoder_config = EncoderConfig.from_description(encoder, file)
    description = open_encoder(encoder_config, "cpu").description
    if lines := describe_differences(encoder, json.loads(json.dumps(description)), ("expected", "got")):
        raise ConfigError(f"weights {file} are not those of the model's encoder: {'; '.join(lines)}")
    if not split_address(encoder_config.model)[0]:
        return pack_encoder_weights(encoder_config)
    return Folder(file).read("")


def _contains(target: Folder, contents: Mapping[str, bytes]) -> bool:
    return set(target.list()) - {TEMPORARY_FOLDER} == contents.keys() and all(
        target.read(name) == content for name, content in contents.items()
    )


def _clear(target: Folder) -> None:
    """Removes the files of an interrupted export. Raises CheckpointError if the folder contains other files."""
    names = [name for name in target.list() if name != TEMPORARY_FOLDER]
    if others := sorted(set(names) - (CHECKPOINT_FILES - {CONFIG})):
        raise CheckpointError(f"{target.uri}: expected a new or empty folder, got files ({', '.join(others[:3])})")
    for name in names:
        target.remove(name)
