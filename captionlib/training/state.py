"""Saves and restores the state of a training run, and checks that its folder can be used."""

import io
import pickle
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
from captionlib.training.metrics_log import CURVES, METRICS, TENSORBOARD

__all__ = [
    "SETTINGS_FILE",
    "RunState",
    "check_run_folder",
    "delete_run",
    "get_rng_states",
    "load_state",
    "save_state",
    "set_rng_states",
]

STATE = "_training/state.pt"
SETTINGS_FILE = "resolved.json"
_RUN_FILES = {"_training", FAILURES_FOLDER, SETTINGS_FILE, METRICS, TENSORBOARD, CURVES, *CHECKPOINT_FILES}
_CHANGEABLE = {"loading", "max_failure_ratio"}  # settings that may differ when a run is resumed
_CHANGEABLE_TRAINING = {"patience", "unigram_patience", "checkpoint_interval_seconds"}


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        epoch: the number of completed epochs.
        step: the number of completed steps of the current epoch.
        training_seconds: the time spent on training, including waiting for data.
        data_wait_seconds: the time spent waiting for data.
        best_score: the best validation score, negated if higher is better.
        best_epoch: the index of the epoch with the best score; -1 before the first epoch has ended.
        loss_total: the sum of the loss in the current epoch, over `loss_count` terms; see `BatchLoss`.
        reward_total: the sum of the rewards in the current epoch, of `reward_count` sampled captions.
        history: the metrics of each epoch.
    """

    epoch: int = 0
    step: int = 0
    training_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    best_score: float = float("inf")
    best_epoch: int = -1
    loss_total: float = 0.0
    loss_count: int = 0
    reward_total: float = 0.0
    reward_count: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def complete_step(self, loss_total: float, loss_count: float, reward_total: float, reward_count: float) -> None:
        """Adds the totals of one step, summed over all processes."""
        self.step += 1
        self.loss_total += loss_total
        self.loss_count += int(loss_count)
        self.reward_total += reward_total
        self.reward_count += int(reward_count)

    def means(self) -> dict[str, float]:
        """Returns the mean loss of the current epoch so far, and the mean reward if there are rewards."""
        means = {"loss": self.loss_total / max(self.loss_count, 1)}
        return {**means, "reward": self.reward_total / self.reward_count} if self.reward_count else means

    def complete_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_total, self.loss_count, self.reward_total, self.reward_count = 0.0, 0, 0.0, 0


def check_run_folder(output: Folder) -> None:
    """Checks that a run may write to a folder.

    Raises:
        DatasetError: the folder holds files that do not belong to a training run.
    """
    if foreign := sorted(set(output.list()) - _RUN_FILES - {TEMPORARY_FOLDER}):
        raise DatasetError(
            f"{output.uri} holds files that do not belong to a training run ({', '.join(foreign[:3])}); "
            "specify an empty or new folder"
        )


def delete_run(output: Folder) -> None:
    """Deletes the files of an earlier run. Call it only when the new run can start."""
    for name in output.list():
        if name in _RUN_FILES:
            output.remove(name)


def save_state(output: Folder, settings: Mapping[str, Any], state: RunState, state_dicts: Mapping[str, Any]) -> None:
    """Saves the state of a run. `state_dicts` holds the states of the model, the optimizer and so on."""
    with output.stage(STATE) as path:
        torch.save({"resolved": settings, "state": vars(state), **state_dicts}, path)


def load_state(output: Folder, settings: Mapping[str, Any]) -> tuple[RunState, dict[str, Any]] | None:
    """Returns the progress and the state dicts that `save_state` wrote, or None if the folder holds no saved state.

    Raises:
        DatasetError: the state is damaged, or the folder holds a run with a different configuration.
    """
    if not output.exists(STATE):
        return None
    content = output.read(STATE)
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise DatasetError(
            f"{output.address(STATE)} cannot be read: {reason}; restore the file, or train again with --overwrite"
        ) from error
    if lines := describe_differences(_select_fixed_settings(saved["resolved"]), _select_fixed_settings(settings)):
        raise DatasetError(
            f"{output.uri} holds a run with a different configuration ({'; '.join(lines)}); "
            "specify a different folder, or pass --overwrite to replace it"
        )
    return RunState(**saved["state"]), saved


def _select_fixed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    changeable = set(_CHANGEABLE_TRAINING)
    if settings["training"]["schedule"] != "cosine":  # the cosine schedule depends on the number of epochs
        changeable.add("epochs")
    training = {name: value for name, value in settings["training"].items() if name not in changeable}
    return {name: value for name, value in settings.items() if name not in _CHANGEABLE} | {"training": training}


def get_rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
