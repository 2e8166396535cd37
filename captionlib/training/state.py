"""The state of a run: all that its next step depends on, and the folder that keeps it."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captionlib.config import describe_differences
from captionlib.data.shards.markers import FAILURES_FOLDER
from captionlib.errors import DatasetError
from captionlib.models.checkpoints.folder import CHECKPOINT_FILES
from captionlib.storage.folders import TEMPORARY_FOLDER, Folder
from captionlib.training.metrics_log import METRICS, TENSORBOARD

__all__ = ["RESOLVED", "RunState", "claim_folder", "get_generators", "load_state", "save_state", "set_generators"]

STATE = "_training/state.pt"
RESOLVED = "resolved.json"
_RUN_FILES = {"_training", FAILURES_FOLDER, RESOLVED, METRICS, TENSORBOARD, "curves.png", *CHECKPOINT_FILES}


@dataclass
class RunState:
    """All that the next step depends on, beside model, optimizer and generator.

    Attributes:
        epoch: epochs done.
        step: steps of the present epoch done.
        updates: steps of all epochs done.
        seconds: spent in training.
        waited: seconds of those that training waited for data.
        best: the best score, its sign turned where higher is better.
        best_epoch: whose it is.
        loss_sum: of the present epoch.
        loss_count: what it is summed over.
        reward_sum: of the present epoch's drawn sentences.
        reward_count: how many they are.
        history: one mapping an epoch.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    best: float = float("inf")
    best_epoch: int = -1
    loss_sum: float = 0.0
    loss_count: int = 0
    reward_sum: float = 0.0
    reward_count: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def add(self, loss: float, count: float, reward: float, drawn: float) -> None:
        """Adds what a step has to show, of all processes; see `BatchLoss`."""
        self.loss_sum += loss
        self.loss_count += int(count)
        self.reward_sum += reward
        self.reward_count += int(drawn)

    def means(self) -> dict[str, float]:
        """The mean loss of the present epoch so far, and the mean reward where there is one."""
        means = {"loss": self.loss_sum / max(self.loss_count, 1)}
        return {**means, "reward": self.reward_sum / self.reward_count} if self.reward_count else means

    def begin_epoch(self) -> None:
        """Goes over to the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.loss_count, self.reward_sum, self.reward_count = 0.0, 0, 0.0, 0


def claim_folder(output: Folder, overwrite: bool) -> None:
    """Makes sure that a run may write into a folder.

    Raises:
        DatasetError: it holds what no run has written.
    """
    names = [name for name in output.list() if name != TEMPORARY_FOLDER]
    if names and not set(names) <= _RUN_FILES:
        strangers = sorted(set(names) - _RUN_FILES)
        raise DatasetError(
            f"{output.uri} holds files that no training run wrote ({', '.join(strangers[:3])}); "
            "give an empty or new folder"
        )
    if overwrite:
        for name in names:
            output.remove(name)


def save_state(output: Folder, resolved: Mapping[str, Any], state: RunState, parts: Mapping[str, Any]) -> None:
    """Writes the state of a run in place of the one before.

    Args:
        output: the run's folder.
        resolved: all that the run depends on.
        state: how far it is.
        parts: tensors and nested mappings of them: model, optimizer, generator.
    """
    with output.stage(STATE) as path:
        torch.save({"resolved": resolved, "state": vars(state), **parts}, path)


def load_state(output: Folder, resolved: Mapping[str, Any]) -> tuple[RunState, dict[str, Any]] | None:
    """The state of the run that a folder holds and its parts; None where there is no run.

    Raises:
        DatasetError: it is a run of another configuration.
    """
    if not output.exists(STATE):
        return None
    saved = torch.load(io.BytesIO(output.read(STATE)), map_location="cpu", weights_only=True)
    if lines := describe_differences(_identity(saved["resolved"]), _identity(resolved)):
        raise DatasetError(
            f"{output.uri} holds a run of another configuration ({'; '.join(lines)}); "
            "give another folder, or --overwrite to replace it"
        )
    return RunState(**saved["state"]), saved


def _identity(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that goes on must share with the one before: all but when it ends, how often it saves, how images are
    loaded, and how many of them may be missing.
    """
    training = {
        name: value
        for name, value in resolved["training"].items()
        if name not in {"patience", "checkpoint_interval_seconds"}
        and (name != "epochs" or resolved["training"]["schedule"] == "cosine")
    }
    kept = {name: value for name, value in resolved.items() if name not in {"loading", "max_failure_ratio"}}
    return {**kept, "training": training}


def get_generators(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a model on this device draws from."""
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Takes back what `get_generators` gave; a GPU's only where there is one."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
