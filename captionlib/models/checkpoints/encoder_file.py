"""Finds the file with the weights of the encoder that a checkpoint was trained with. Does not import PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captionlib.data.shards.markers import from_json_with_checksum
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.families.registry import split_address
from captionlib.storage.folders import Folder

__all__ = [
    "CONFIG",
    "ENCODER",
    "ENCODER_ADDRESS",
    "LOCAL_WEIGHTS",
    "WEIGHTS",
    "find_encoder_file",
    "missing_encoder_error",
    "not_a_checkpoint_error",
    "require_checkpoint_files",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ENCODER = "encoder.safetensors"
ENCODER_ADDRESS = "encoder_weights"  # key in the provenance, for the path or URL of the encoder's weights

LOCAL_WEIGHTS = ("file", "folder")
"""Values of `weights` in the description of an encoder whose weights came from a local file or folder."""


def find_encoder_file(folder: Folder, encoder: Mapping[str, Any], provenance: Mapping[str, Any]) -> str | None:
    """Returns the path or URL of the encoder's weights file or model folder, or None if there is none.

    Looks in the checkpoint's folder for `encoder.safetensors` and for a file with the recorded name, and then at the
    recorded path, which is in `provenance` (the record of the training data). The content is not verified.
    """
    if encoder.get("weights") not in LOCAL_WEIGHTS:
        return None
    if encoder["weights"] == "file" and folder.exists(ENCODER):
        return folder.address(ENCODER)
    recorded = provenance.get(ENCODER_ADDRESS)
    if not isinstance(recorded, str) or not recorded:
        return None
    name = recorded.rstrip("/").rsplit("/", 1)[-1]
    if name != WEIGHTS and folder.exists(name):
        return folder.address(name)
    is_address = Path(recorded).is_absolute() or "://" in recorded  # otherwise only a file name
    return recorded if is_address and _exists(recorded) else None


def missing_encoder_error(encoder: Mapping[str, Any], provenance: Mapping[str, Any]) -> ConfigError:
    recorded = provenance.get(ENCODER_ADDRESS)
    problem = f"{recorded}, which does not exist" if recorded else "whose path was not recorded"
    kind = "model folder" if encoder.get("weights") == "folder" else "weights file"
    return ConfigError(
        f"the encoder ({encoder.get('model')} at {encoder.get('node')}) was loaded from a {kind}, {problem}; "
        f"specify its path with --weights (SHA-256: {encoder.get('weights_sha256')})"
    )


def not_a_checkpoint_error(folder: Folder) -> CheckpointError:
    return CheckpointError(f"{folder.uri} is not a checkpoint: expected a folder with {CONFIG} and {WEIGHTS}")


def require_checkpoint_files(address: str, weights: str | None) -> None:
    """Checks that a checkpoint exists and that the weights of its encoder can be found, without loading them.

    Commands call this function before they import PyTorch, which takes longer. An address with the prefix of a family
    (a provider of models), such as `hf:`, is not checked. `weights` is the path of the encoder's weights file, if the
    user specified it.

    Raises:
        CheckpointError: the folder is not a checkpoint.
        ConfigError: the encoder's weights cannot be found.
    """
    if split_address(address)[0]:
        return
    folder = Folder(address)
    try:
        config = from_json_with_checksum(folder.read(CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        raise not_a_checkpoint_error(folder) from None
    except ValueError:
        return  # damaged; loading it reports the details
    encoder, provenance = config.get("encoder"), config.get("provenance")
    if not isinstance(encoder, dict) or not isinstance(provenance, dict) or encoder.get("weights") not in LOCAL_WEIGHTS:
        return
    if weights is not None and not _exists(weights):
        raise ConfigError(f"--weights {weights}: not found")
    if weights is None and find_encoder_file(folder, encoder, provenance) is None:
        raise missing_encoder_error(encoder, provenance)


def _exists(address: str) -> bool:
    """Returns whether a local file or folder exists. Remote files are assumed to exist, because checking takes time."""
    target = Folder(address)
    return not target.is_local or target.exists("")
