"""The training loop of all models. An `Objective` defines what to train, and a `TrainingConfig` defines how.

A run can be interrupted at any step by Ctrl-C, SIGTERM or a crash. Calling `train` again with the same arguments
resumes the run from its last saved state. On a CPU, the resulting weights are bitwise identical to those of an
uninterrupted run.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Generic

import torch
from torch import nn

from captionlib.data.shards.markers import to_json
from captionlib.errors import DatasetError, TrainingDiverged, TrainingInterrupted
from captionlib.models.checkpoints.folder import WEIGHTS
from captionlib.progress import progress_bar
from captionlib.storage.folders import Folder
from captionlib.training.distributed import ProcessGroup
from captionlib.training.interrupts import catch_stop_signals
from captionlib.training.metrics_log import log_epoch, plot_curves
from captionlib.training.objective import Batch, Model, Objective
from captionlib.training.optimization import (
    TrainingConfig,
    apply_average,
    average_weights,
    make_optimizer,
    make_scheduler,
    schedule_factor,
)
from captionlib.training.state import (
    SETTINGS_FILE,
    RunState,
    get_rng_states,
    load_state,
    save_state,
    set_rng_states,
)

__all__ = ["TrainingConfig", "train"]

_CURVES_INTERVAL_SECONDS = 30.0


def train(
    objective: Objective[Batch, Model],
    config: TrainingConfig,
    output: Folder,
    settings: dict[str, Any],
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a model, or resumes an interrupted run. `output` holds the checkpoint of the best epoch so far.

    Inside a `join_process_group` block, all processes train one model together. `settings` holds all settings of the
    run, including `config` under the key `training`, and the fingerprints (hashes) of its inputs.

    Returns:
        The metrics of each epoch: `epoch`, `loss`, the mean `reward` of sampled captions if the objective has rewards,
        the validation scores, `learning_rate`, `total_seconds` of training since the first epoch, and
        `data_wait_fraction`, the fraction of this time that was spent waiting for data.

    Raises:
        DatasetError: the folder holds a run with a different configuration, or its checkpoint has been removed.
        TrainingDiverged: the loss or a validation score is not finite, or the perplexity stays above that of a unigram
            model. The checkpoint of the best epoch is kept.
        TrainingInterrupted: Ctrl-C or SIGTERM stopped the run; its state is saved.
    """
    run = _Run(objective, config, output, settings, progress)
    run.resume()
    with catch_stop_signals(abort_on_repeat=run.group.world_size == 1) as is_stop_requested:
        while not run.is_finished():
            run.require_better_than_unigram()
            run.train_epoch(is_stop_requested)
            run.complete_epoch()
        run.plot_new_curves()
        run.require_better_than_unigram()
        run.require_checkpoint()
    return run.state.history


class _Run(Generic[Batch, Model]):
    """The state and methods of a single call to `train`."""

    def __init__(
        self,
        objective: Objective[Batch, Model],
        config: TrainingConfig,
        output: Folder,
        settings: dict[str, Any],
        progress: bool,
    ) -> None:
        model = objective.model
        self.state = RunState()
        self.group = ProcessGroup()
        self._objective = objective
        self._config = config
        self._output = output
        self._settings = settings
        self._progress = progress and self.group.is_first
        self.group.broadcast(model.state_dict().values())
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self._steps_per_epoch = objective.steps_per_epoch()
        self._optimizer = make_optimizer(model, config, objective.module_learning_rates)
        self._scheduler = make_scheduler(self._optimizer, config, self._steps_per_epoch)
        self._average = None if config.ema_decay is None else average_weights(model, config.ema_decay)
        self._curves_plotted_time = time.monotonic()
        self._curves_plotted_epochs = 0
        torch.manual_seed(config.seed + self.group.rank)

    def resume(self) -> None:
        """Restores the last saved state, if any, and writes the settings of the run."""
        saved = self.group.run_on_process_0(lambda: load_state(self._output, self._settings))
        if saved is not None:
            self.state, state_dicts = saved
            self._objective.model.load_state_dict(state_dicts["model"])
            self._optimizer.load_state_dict(state_dicts["optimizer"])
            self._scheduler.load_state_dict(state_dicts["scheduler"])
            if self._average is not None:
                self._average.load_state_dict(state_dicts["average"])
            set_rng_states(state_dicts["rng_states"][self.group.rank], self._device)
            self.require_checkpoint()
        if self.group.is_first:
            self._output.write(SETTINGS_FILE, to_json(self._settings))

    def is_finished(self) -> bool:
        state, patience = self.state, self._config.patience
        is_patience_exhausted = patience is not None and state.epoch - 1 - state.best_epoch >= patience
        return state.epoch >= self._config.epochs or (state.step == 0 and is_patience_exhausted)

    def require_better_than_unigram(self) -> None:
        """Checks that the validation perplexity is below that of the unigram model (word frequencies alone).

        Raises:
            TrainingDiverged: the last `unigram_patience` epochs all failed this check. If the run has fewer epochs, a
                warning is printed instead.
        """
        bound, patience = self._objective.unigram_perplexity, self._config.unigram_patience
        if bound is None or patience is None:
            return
        last = [row["perplexity"] for row in self.state.history[-patience:]]
        if not last or min(last) <= bound:
            return
        values = ", ".join(f"{value:.1f}" for value in last)
        reason = (
            f"expected a validation perplexity below {bound:.1f}, that of the word frequencies (unigram model), got "
            f"{values} in the last {'epoch' if len(last) == 1 else f'{len(last)} epochs'}"
        )
        if len(last) == patience:
            raise self._diverged(reason, "; set training.unigram_patience to null to continue anyway")
        if self.group.is_first and self.is_finished():
            print(f"warning: {reason}; train longer or with a lower training.learning_rate", file=sys.stderr)

    def require_checkpoint(self) -> None:
        """Raises DatasetError if the folder no longer holds the checkpoint of the best epoch."""
        if self.state.best_epoch >= 0 and not self.group.run_on_process_0(lambda: self._output.exists(WEIGHTS)):
            raise DatasetError(
                f"{self._output.uri} does not hold the checkpoint of epoch {self.state.best_epoch + 1}, because files "
                "were removed or moved; train again with --overwrite"
            )

    def _require_finite(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise self._diverged(f"expected a finite {name}, got {value} in epoch {self.state.epoch + 1}")

    def _diverged(self, reason: str, hint: str = "") -> TrainingDiverged:
        best, uri = self.state.best_epoch, self._output.uri
        kept = f"the checkpoint of epoch {best + 1} is kept in {uri}" if best >= 0 else f"{uri} holds no checkpoint yet"
        return TrainingDiverged(
            f"training stopped: {reason}; {kept}; train again in a new folder with a training.learning_rate below "
            f"{self._config.learning_rate:g} or with training.clip_norm{hint}"
        )

    def save(self) -> None:
        rng_states = self.group.gather(get_rng_states(self._device))
        if self.group.is_first:
            state_dicts = {
                "model": self._objective.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scheduler": self._scheduler.state_dict(),
                "average": None if self._average is None else self._average.state_dict(),
                "rng_states": rng_states,
            }
            save_state(self._output, self._settings, self.state, state_dicts)

    def train_epoch(self, is_stop_requested: Callable[[], bool]) -> None:
        state, config = self.state, self._config
        self._objective.model.train()
        batches = self._objective.batches(config.seed, state.epoch, state.step)
        label = f"epoch {state.epoch + 1}/{config.epochs}"
        last_save = time.monotonic()
        with progress_bar(label, self._steps_per_epoch, "batches", self._progress) as bar:
            bar.skip(state.step)
            for batch in self._measure_time(batches):
                save_at = last_save + config.checkpoint_interval_seconds
                must_stop, must_save = self._train_step(batch, is_stop_requested, save_at)
                bar.update(1, "  ".join(f"{name} {value:.3f}" for name, value in state.means().items()))
                if must_stop or must_save:
                    self.save()
                    last_save = time.monotonic()
                if must_stop:
                    raise TrainingInterrupted("training was stopped; run the same command again to resume")

    def _measure_time(self, batches: Iterator[Batch | None]) -> Iterator[Batch | None]:
        started = time.monotonic()
        for batch in batches:
            self.state.data_wait_seconds += time.monotonic() - started
            yield batch
            finished = time.monotonic()
            self.state.training_seconds += finished - started
            started = finished

    def _train_step(
        self, batch: Batch | None, is_stop_requested: Callable[[], bool], save_at: float
    ) -> tuple[bool, bool]:
        """Takes one step. Returns whether any process must stop, and whether it is time to save the state."""
        config = self._config
        loss = None
        if batch is not None:  # None if this process has no part of the step's batch
            with torch.autocast(self._device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = self._objective.loss(batch)
        self._optimizer.zero_grad()
        if loss is not None:
            loss.mean.backward()  # type: ignore[no-untyped-call]
        totals = (0.0, 0, 0.0, 0) if loss is None else loss[1:]  # total and count of the loss and of the reward
        must_save = self.group.is_first and time.monotonic() > save_at
        # A single all-reduce sums the totals and lets the processes agree on stopping and saving.
        *group_totals, stops, saves = self.group.sum([*totals, is_stop_requested(), must_save], self._device)
        self._require_finite({"loss": group_totals[0]})
        self.group.average_gradients(self._parameters, weight=totals[1] / max(group_totals[1], 1))
        if config.clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters, config.clip_value)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, config.clip_norm)
        self._optimizer.step()
        self._scheduler.step()
        if self._average is not None:
            self._average.update_parameters(self._objective.model)
        self.state.complete_step(*group_totals)
        return stops > 0, saves > 0

    def complete_epoch(self) -> None:
        """Validates the model, with averaged weights if `ema_decay` is set, and saves the results."""
        model = self._objective.model
        with nullcontext() if self._average is None else apply_average(model, self._average):
            model.eval()
            with torch.inference_mode():
                scores = self.group.run_on_process_0(self._objective.validate)
            self._require_finite(scores)
            self._record_epoch(scores)
        self.save()
        if time.monotonic() > self._curves_plotted_time + _CURVES_INTERVAL_SECONDS:
            self.plot_new_curves()

    def plot_new_curves(self) -> None:
        history = self.state.history
        if self.group.is_first and len(history) > self._curves_plotted_epochs:
            plot_curves(self._output, history)
            self._curves_plotted_time, self._curves_plotted_epochs = time.monotonic(), len(history)

    def _record_epoch(self, scores: dict[str, float]) -> None:
        """Logs the metrics of an epoch, and writes the checkpoint if the epoch is the best so far."""
        state, objective = self.state, self._objective
        factor = schedule_factor(self._config, self._scheduler.last_epoch, self._steps_per_epoch)
        row = {
            "epoch": state.epoch + 1,
            **state.means(),
            **scores,
            "learning_rate": self._config.learning_rate * factor,
            "total_seconds": round(state.training_seconds, 1),
            "data_wait_fraction": round(state.data_wait_seconds / max(state.training_seconds, 1e-9), 4),
        }
        state.history.append(row)
        if self._progress:
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        score = scores[objective.score_name] * (-1 if objective.higher_is_better else 1)
        is_best = score < state.best_score
        if is_best:
            state.best_score, state.best_epoch = score, state.epoch
        state.complete_epoch()
        if self.group.is_first:
            if is_best:
                objective.save(self._output, {"history": state.history, "resolved": self._settings})
            log_epoch(self._output, state.history)
