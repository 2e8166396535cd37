"""The training loop, the same for every model: what is trained is an objective, how it is trained stands here.

A run may be stopped at any step, by Ctrl-C, by SIGTERM or by a dying machine. Started again it goes on from its last
saved state, which holds all that the next step depends on: on a CPU the weights come out bit for bit as if it had never
stopped.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Generic

import torch
from torch import nn

from captionlib.data.shards.markers import to_json
from captionlib.errors import TrainingInterrupted
from captionlib.progress import progress_bar
from captionlib.storage.folders import Folder
from captionlib.training.averaging import WeightAverage
from captionlib.training.distributed import ProcessGroup
from captionlib.training.interrupts import stop_requests
from captionlib.training.metrics_log import report_epoch
from captionlib.training.objective import Batch, Objective, is_higher_better, own_learning_rates
from captionlib.training.optimization import TrainingConfig, learning_rate, make_optimizer
from captionlib.training.state import (
    RESOLVED,
    RunState,
    claim_folder,
    get_generators,
    load_state,
    save_state,
    set_generators,
)

__all__ = ["Objective", "TrainingConfig", "claim_folder", "seed_everything", "train"]


def train(
    objective: Objective[Batch],
    config: TrainingConfig,
    output: Folder,
    resolved: dict[str, Any],
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains, or goes on with a run that was stopped; the best epoch's checkpoint is in `output` at any time.

    Within `join_processes` the processes train one model together, see processes.py.

    Args:
        objective: what is trained.
        config: how.
        output: the run's folder.
        resolved: all that the run depends on, `training` being `config`; a run that differs is not gone on with.
        progress: show a bar.

    Returns:
        One mapping an epoch: epoch, loss, the mean reward where there is one, the validation scores, the learning rate,
        the seconds spent in training since the start, and the share of them that training waited for data.

    Raises:
        DatasetError: the folder holds a run of another configuration.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    run = _Run(objective, config, output, resolved)
    run.resume()
    progress = progress and run.processes.is_first
    with stop_requests(insistent=run.processes.count == 1) as stopped:
        while not run.is_over():
            run.train_epoch(stopped, progress)
            run.end_epoch(progress)
    return run.state.history


class _Run(Generic[Batch]):
    def __init__(
        self, objective: Objective[Batch], config: TrainingConfig, output: Folder, resolved: dict[str, Any]
    ) -> None:
        self.state = RunState()
        self.processes = ProcessGroup()
        self._objective = objective
        self._config = config
        self._output = output
        self._resolved = resolved
        self.processes.copy_from_first(objective.model.state_dict().values())
        self._optimizer = make_optimizer(objective.model, config, own_learning_rates(objective))
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._parameters = [parameter for parameter in objective.model.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        decay = config.ema_decay
        self._average = None if decay is None else WeightAverage(self._parameters, decay)
        seed_everything(config.seed + self.processes.rank)

    def resume(self) -> None:
        found = self.processes.from_first(lambda: load_state(self._output, self._resolved))
        if found is not None:
            self.state, parts = found
            self._objective.model.load_state_dict(parts["model"])
            self._optimizer.load_state_dict(parts["optimizer"])
            if self._average is not None:
                self._average.load_state_dict(parts["average"])
            set_generators(parts["generators"][self.processes.rank], self._device)
        if self.processes.is_first:
            self._output.write(RESOLVED, to_json(self._resolved))

    def is_over(self) -> bool:
        state, patience = self.state, self._config.patience
        return state.epoch >= self._config.epochs or (
            patience is not None and state.epoch - 1 - state.best_epoch >= patience and state.step == 0
        )

    def save(self) -> None:
        generators = self.processes.gather(get_generators(self._device))
        if self.processes.is_first:
            parts = {
                "model": self._objective.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "average": None if self._average is None else self._average.state_dict(),
                "generators": generators,
            }
            save_state(self._output, self._resolved, self.state, parts)

    def train_epoch(self, stopped: Callable[[], bool], progress: bool) -> None:
        state, config = self.state, self._config
        self._objective.model.train()
        began = saved = time.monotonic()
        label = f"epoch {state.epoch + 1}/{config.epochs}"
        with progress_bar(label, self._objective.steps(), "batches", progress) as bar:
            bar.skip(state.step)
            for batch in self._waited_for(self._objective.batches(config.seed, state.epoch, state.step)):
                stopping, saving = self._step(batch, stopped, saved + config.checkpoint_interval_seconds)
                bar.update(1, "  ".join(f"{name} {value:.3f}" for name, value in state.means().items()))
                if stopping or saving:
                    saved = time.monotonic()
                    state.seconds, began = state.seconds + saved - began, saved
                    self.save()
                if stopping:
                    raise TrainingInterrupted("training was stopped; run the same command again to resume")
        state.seconds += time.monotonic() - began

    def _waited_for(self, batches: Iterator[Batch | None]) -> Iterator[Batch | None]:
        """The batches, while the time that they are waited for is added up."""
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.state.waited += time.monotonic() - began
            yield batch

    def _step(self, batch: Batch | None, stopped: Callable[[], bool], save_at: float) -> tuple[bool, bool]:
        """Learns from a batch. Says whether anyone wants to stop, and whether it is time to save."""
        config, state = self._config, self.state
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = self._scheduled(rate)
        loss = None
        if batch is not None:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = self._objective.loss(batch)
        self._optimizer.zero_grad(set_to_none=True)
        if loss is not None:
            loss.mean.backward()  # type: ignore[no-untyped-call]
        shown = (0.0, 0, 0.0, 0) if loss is None else (loss.total, loss.size, loss.reward, loss.drawn)
        due = self.processes.is_first and time.monotonic() > save_at
        *sums, stopping, saving = self.processes.sum([*shown, stopped(), due], self._device)
        self.processes.average_gradients(self._parameters, shown[1] / max(sums[1], 1))
        if config.clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters, config.clip_value)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, config.clip_norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.update()
        state.step += 1
        state.updates += 1
        state.add(*sums)
        return stopping > 0, saving > 0

    def _scheduled(self, rate: float) -> float:
        state = self.state
        progress = state.epoch + state.step / max(1, self._objective.steps())
        return learning_rate(rate, self._config, progress, state.updates)

    def end_epoch(self, progress: bool) -> None:
        with nullcontext() if self._average is None else self._average.applied():
            self._judge(progress)
        self.save()

    def _judge(self, progress: bool) -> None:
        """Validates the weights of an epoch that has ended, and keeps them where they are the best."""
        state, objective = self.state, self._objective
        objective.model.eval()
        with torch.inference_mode():
            scores = self.processes.from_first(objective.validate)
        row = {
            "epoch": state.epoch + 1,
            **state.means(),
            **scores,
            "learning_rate": self._scheduled(self._config.learning_rate),
            "seconds": round(state.seconds, 1),
            "data_wait": round(state.waited / max(state.seconds, 1e-9), 4),
        }
        state.history.append(row)
        if progress:
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        score = scores[objective.score_name] * (-1 if is_higher_better(objective) else 1)
        better = score < state.best
        if better:
            state.best, state.best_epoch = score, state.epoch
        state.begin_epoch()
        if self.processes.is_first:
            if better:
                objective.save(self._output, {"history": state.history, "resolved": self._resolved})
            report_epoch(self._output, state.history)


def seed_everything(seed: int) -> None:
    """Seeds what draws numbers in training."""
    random.seed(seed)
    torch.manual_seed(seed)
