"""Shares models between the threads of a process, and detects checkpoints that are replaced during a run."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import torch

from captionlib.errors import CheckpointError
from captionlib.models.devices import resolve_device
from captionlib.models.families.model import ImageModel
from captionlib.models.families.registry import resolve_model_address

__all__ = ["CheckpointCache", "CheckpointVersion"]

Model = TypeVar("Model", bound=ImageModel)


@dataclass(frozen=True)
class CheckpointVersion:
    """A checkpoint, and the version of the checkpoint at the start of a run."""

    folder: str  # absolute path or URL of the checkpoint, or an address with a prefix, such as `hf:FOLDER`
    fingerprint: str  # of everything that determines the model's output

    def require_unchanged(self, part: str, expected: object, actual: object) -> None:
        """Raises CheckpointError if a part of the checkpoint is not the same as at the start of the run."""
        if expected != actual:
            raise CheckpointError(
                f"{self.folder}: expected the {part} that the run started with, {expected}, got {actual}; start again "
                "with --overwrite"
            )


class CheckpointCache(Generic[Model]):
    """Caches the most recently loaded model for all threads of a process; `load` loads a model onto the CPU."""

    def __init__(self, load: Callable[[str], Model]) -> None:
        self._load = load
        self._lock = Lock()
        self._entry: tuple[CheckpointVersion, Model] | None = None
        self._device: torch.device | None = None  # device of the cached model; None if it has not been moved yet

    def load_with_version(self, folder: str | os.PathLike[str]) -> tuple[Model, CheckpointVersion]:
        """Loads and caches a model. Also returns its version, which workers pass to `get` to use the same weights."""
        model = self._load(os.fspath(folder))
        checkpoint = CheckpointVersion(resolve_model_address(folder), model.fingerprint)
        with self._lock:
            self._entry, self._device = (checkpoint, model), None
        return model, checkpoint

    def get(self, checkpoint: CheckpointVersion, device: str) -> Model:
        """Returns this version of a model on a device. Raises CheckpointError if the checkpoint was replaced."""
        torch_device = resolve_device(device)
        with self._lock:  # other threads wait while one loads
            if self._entry is None or self._entry[0] != checkpoint:
                model = self._load(checkpoint.folder)
                checkpoint.require_unchanged("model", checkpoint.fingerprint, model.fingerprint)
                self._entry, self._device = (checkpoint, model), None
            model = self._entry[1]
            # A needless move would replace the parameters while other threads copy or use them.
            if self._device != torch_device:
                model.to(torch_device)
                self._device = torch_device
            return model
