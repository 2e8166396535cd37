"""The training loop, the same for every model: what is trained is an objective, how it is trained stands here.

A run may be stopped at any step, by Ctrl-C, by SIGTERM or by a dying machine. Started again it goes on from its last
saved state, which holds all that the next step depends on: on a CPU the weights come out bit for bit as if it had never
stopped.
"""

import io
import json
import math
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captionlib.config import differences
from captionlib.errors import ConfigError, DatasetError
from captionlib.storage import TEMPORARY, Folder

__all__ = ["LoopConfig", "Objective", "TrainingStopped", "claim_folder", "seed_everything", "train"]

STATE = "_training/state.pt"
METRICS = "metrics.jsonl"
_RUN_FILES = {"_training", METRICS, "curves.png", "config.json", "model.safetensors", "training.json"}

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class LoopConfig:
    """How a model is trained.

    Attributes:
        epochs: passes over the training images at the most.
        optimizer: `rmsprop` as in the talk, or `adam`, or `adamw`.
        learning_rate: of the optimizer, before the schedule.
        rmsprop_decay: of RMSprop's average of squares (NeuralTalk's 0.999).
        weight_decay: of AdamW.
        schedule: `constant`, or `cosine` down to a hundredth of the learning rate over all epochs.
        clip_value: bound on each element of the gradient (the talk's 5); None is none.
        clip_norm: bound on the gradient's norm; None is none.
        patience: epochs without a better validation score after which training ends; None is never.
        save_seconds: how often the state is saved within an epoch.
        seed: of the order of the images, of dropout, and of the first weights.
    """

    epochs: int = 20
    optimizer: Literal["rmsprop", "adam", "adamw"] = "rmsprop"
    learning_rate: float = 1e-3
    rmsprop_decay: float = 0.999
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    clip_value: float | None = 5.0
    clip_norm: float | None = None
    patience: int | None = 3
    save_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"training.epochs: expected at least 1, got {self.epochs}")
        if not self.learning_rate > 0:
            raise ConfigError(f"training.learning_rate: expected more than 0, got {self.learning_rate}")


class Objective(Protocol[Batch]):
    """A model, what it learns from, and how well it does."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def score_name(self) -> str:
        """Which of the validation scores decides, such as `perplexity`; lower is better."""

    def batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch; the same for the same seed and epoch."""

    def steps(self) -> int:
        """About how many batches an epoch has."""

    def loss(self, batch: Batch) -> tuple[Tensor, float, int]:
        """What to minimise; the summed loss and the count it is summed over, to show."""

    def validate(self) -> dict[str, float]:
        """The scores on held-out images."""

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        """Writes the checkpoint that is used later."""


class TrainingStopped(Exception):  # noqa: N818 - not an error: someone asked for it
    """Someone stopped the run; it can go on."""


@dataclass
class _State:
    """All that the next step depends on, beside model and optimizer."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best: float = float("inf")
    best_epoch: int = -1
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def claim_folder(output: Folder, overwrite: bool) -> None:
    """Makes sure that a run may write into a folder.

    Raises:
        DatasetError: it holds what no run has written.
    """
    names = [name for name in output.list() if name != TEMPORARY]
    if names and not set(names) <= _RUN_FILES:
        strangers = sorted(set(names) - _RUN_FILES)
        raise DatasetError(
            f"{output.uri} holds files that no training run wrote ({', '.join(strangers[:3])}); "
            "give an empty or new folder"
        )
    if overwrite:
        for name in names:
            output.remove(name)


def train(
    objective: Objective[Batch],
    config: LoopConfig,
    output: Folder,
    resolved: dict[str, Any],
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains, or goes on with a run that was stopped; the best epoch's checkpoint is in `output` at any time.

    Args:
        objective: what is trained.
        config: how.
        output: the run's folder.
        resolved: all that the run depends on, `training` being `config`; a run that differs is not gone on with.
        progress: show a bar.

    Returns:
        One mapping an epoch: epoch, loss, the validation scores, seconds.

    Raises:
        DatasetError: the folder holds a run of another configuration.
        TrainingStopped: Ctrl-C or SIGTERM; the state is saved.
    """
    run = _Run(objective, config, output, resolved)
    run.resume()
    with _stop_requests() as stopped:
        while not run.is_over():
            run.train_epoch(stopped, progress)
            run.end_epoch(progress)
    return run.state.history


class _Run(Generic[Batch]):
    def __init__(
        self, objective: Objective[Batch], config: LoopConfig, output: Folder, resolved: dict[str, Any]
    ) -> None:
        self.state = _State()
        self._objective = objective
        self._config = config
        self._output = output
        self._resolved = resolved
        self._optimizer = _make_optimizer(objective.model, config)
        seed_everything(config.seed)

    def resume(self) -> None:
        if not self._output.exists(STATE):
            return
        saved = torch.load(io.BytesIO(self._output.read(STATE)), weights_only=True)
        if lines := differences(_identity(saved["resolved"]), _identity(self._resolved)):
            raise DatasetError(
                f"{self._output.uri} holds a run of another configuration ({'; '.join(lines)}); "
                "give another folder, or --overwrite to replace it"
            )
        self.state = _State(**saved["state"])
        self._objective.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])

    def is_over(self) -> bool:
        state, patience = self.state, self._config.patience
        return state.epoch >= self._config.epochs or (
            patience is not None and state.epoch - 1 - state.best_epoch >= patience and state.step == 0
        )

    def save(self) -> None:
        with self._output.staged(STATE) as path:
            torch.save(
                {
                    "resolved": self._resolved,
                    "state": vars(self.state),
                    "model": self._objective.model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                },
                path,
            )

    def train_epoch(self, stopped: Callable[[], bool], progress: bool) -> None:
        state, config = self.state, self._config
        self._objective.model.train()
        batches = self._objective.batches(config.seed, state.epoch)
        began = saved = time.monotonic()
        with tqdm(
            islice(batches, state.step, None),
            desc=f"epoch {state.epoch + 1}/{config.epochs}",
            initial=state.step,
            total=self._objective.steps(),
            unit="batch",
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            for batch in bar:
                self._step(batch)
                bar.set_postfix(loss=f"{state.loss_sum / max(state.loss_count, 1):.3f}", refresh=False)
                if stopped() or time.monotonic() - saved > config.save_seconds:
                    saved = time.monotonic()
                    state.seconds, began = state.seconds + saved - began, saved
                    self.save()
                    if stopped():
                        raise TrainingStopped
        state.seconds += time.monotonic() - began

    def _step(self, batch: Batch) -> None:
        config, state = self._config, self.state
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        loss, summed, count = self._objective.loss(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(self._objective.model.parameters())
        if config.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, config.clip_value)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        self._optimizer.step()
        state.step += 1
        state.loss_sum += summed
        state.loss_count += count

    def _learning_rate(self) -> float:
        if self._config.schedule == "constant":
            return self._config.learning_rate
        done = (self.state.epoch + self.state.step / max(1, self._objective.steps())) / self._config.epochs
        return self._config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1.0))) / 2)

    def end_epoch(self, progress: bool) -> None:
        state = self.state
        self._objective.model.eval()
        with torch.inference_mode():
            scores = self._objective.validate()
        score = scores[self._objective.score_name]
        row = {
            "epoch": state.epoch + 1,
            "loss": state.loss_sum / max(state.loss_count, 1),
            **scores,
            "learning_rate": self._learning_rate(),
            "seconds": round(state.seconds, 1),
        }
        state.history.append(row)
        if progress:
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        better = score < state.best
        if better:
            state.best, state.best_epoch = score, state.epoch
        state.epoch, state.step, state.loss_sum, state.loss_count = state.epoch + 1, 0, 0.0, 0
        if better:
            self._objective.save(self._output, {"history": state.history, "resolved": self._resolved})
        self._output.write(METRICS, "".join(json.dumps(line) + "\n" for line in state.history).encode())
        self.save()


def _identity(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that goes on must share with the one before: when it ends, and how often it saves, may change."""
    training = {
        name: value
        for name, value in resolved["training"].items()
        if name not in {"patience", "save_seconds"}
        and (name != "epochs" or resolved["training"]["schedule"] != "constant")
    }
    return {**resolved, "training": training}


def _make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.learning_rate, alpha=config.rmsprop_decay)
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def seed_everything(seed: int) -> None:
    """Seeds what draws numbers in training."""
    random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks between two steps."""
    requests: list[int] = []

    def note(number: int, _frame: object) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: nobody sends signals here
        previous = {}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
