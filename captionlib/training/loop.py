"""The training loop, the same for every model: what is trained is an objective, how it is trained stands here.

A run may be stopped at any step, by Ctrl-C, by SIGTERM or by a dying machine. Started again it goes on from its last
saved state, which holds all that the next step depends on: on a CPU the weights come out bit for bit as if it had never
stopped.
"""

import json
import random
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, Generic

import torch
from torch import nn
from tqdm import tqdm

from captionlib.storage import Folder
from captionlib.training.interrupts import TrainingStopped, stop_requests
from captionlib.training.objective import Batch, Objective
from captionlib.training.recipe import LoopConfig, learning_rate, make_optimizer
from captionlib.training.state import METRICS, RunState, claim_folder, load_state, save_state

__all__ = ["LoopConfig", "Objective", "TrainingStopped", "claim_folder", "seed_everything", "train"]


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
    with stop_requests() as stopped:
        while not run.is_over():
            run.train_epoch(stopped, progress)
            run.end_epoch(progress)
    return run.state.history


class _Run(Generic[Batch]):
    def __init__(
        self, objective: Objective[Batch], config: LoopConfig, output: Folder, resolved: dict[str, Any]
    ) -> None:
        self.state = RunState()
        self._objective = objective
        self._config = config
        self._output = output
        self._resolved = resolved
        self._optimizer = make_optimizer(objective.model, config)
        seed_everything(config.seed)

    def resume(self) -> None:
        found = load_state(self._output, self._resolved)
        if found is None:
            return
        self.state, parts = found
        self._objective.model.load_state_dict(parts["model"])
        self._optimizer.load_state_dict(parts["optimizer"])
        torch.set_rng_state(parts["rng"])

    def is_over(self) -> bool:
        state, patience = self.state, self._config.patience
        return state.epoch >= self._config.epochs or (
            patience is not None and state.epoch - 1 - state.best_epoch >= patience and state.step == 0
        )

    def save(self) -> None:
        parts = {
            "model": self._objective.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        save_state(self._output, self._resolved, self.state, parts)

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
        return learning_rate(self._config, self.state.epoch + self.state.step / max(1, self._objective.steps()))

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


def seed_everything(seed: int) -> None:
    """Seeds what draws numbers in training."""
    random.seed(seed)
    torch.manual_seed(seed)
