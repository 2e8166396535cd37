import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensorboardX.proto import event_pb2
from torch import Tensor, nn

from captionlib.errors import DatasetError, TrainingDiverged, TrainingInterrupted
from captionlib.storage.folders import Folder
from captionlib.training.loop import TrainingConfig, train
from captionlib.training.objective import BatchLoss
from captionlib.training.state import check_run_folder, delete_run

CONFIG = TrainingConfig(epochs=3, checkpoint_interval_seconds=0, patience=None)
STEPS = 4


@pytest.fixture(autouse=True)
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of drawing curves, which other tests cover."""
    monkeypatch.setattr("captionlib.training.loop.plot_curves", lambda *_: None)


class Line:
    """Fits y = 2 x with dropout, so that each step also depends on the random number generator."""

    score_name = "error"
    higher_is_better = False
    unigram_perplexity: float | None = None
    module_learning_rates: ClassVar[dict[str, float]] = {}

    def __init__(self, at_step: Callable[[int], None] = lambda _: None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.saved: list[int] = []
        self.errors: list[float] = []
        self._step = 0
        self._at_step = at_step

    def batches(self, seed: int, epoch: int, first_batch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        return islice((torch.randn(5, 3, generator=generator) for _ in range(STEPS)), first_batch, None)

    def steps_per_epoch(self) -> int:
        return STEPS

    def loss(self, batch: Tensor) -> BatchLoss:
        self._step += 1
        self._at_step(self._step)
        loss = (self.model(batch) - 2 * batch).square().mean()
        return BatchLoss(loss, loss.item() * len(batch), len(batch))

    def validate(self) -> dict[str, float]:
        error = self.errors.pop(0) if self.errors else float(self.model(torch.ones(1, 3)).sub(2).abs().mean())
        return {"error": error}

    def save(self, output: Folder, training: dict[str, Any]) -> None:
        self.saved.append(len(training["history"]))
        output.write("model.safetensors", b"")


def run(objective: Line, folder: Path, config: TrainingConfig = CONFIG) -> list[dict[str, float]]:
    return train(objective, config, Folder(folder), {"training": vars(config)}, progress=False)


def weights(objective: Line) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in objective.model.parameters()]


def crash_at(wanted: int) -> Callable[[int], None]:
    def crash(step: int) -> None:
        if step == wanted:
            raise RuntimeError("crash")

    return crash


RECIPES: list[dict[str, Any]] = [
    {"optimizer": "rmsprop", "schedule": "cosine"},
    {"optimizer": "adam", "schedule": "cosine", "ema_decay": 0.9},
    {"optimizer": "adamw", "warmup_steps": STEPS + 2, "clip_norm": 0.1},
    {"optimizer": "adam", "precision": "bfloat16", "ema_decay": 0.5, "warmup_steps": 2},
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("step", [1, 3, STEPS + 1, 2 * STEPS, 3 * STEPS])
def test_crashed_run_resumes_bit_for_bit(tmp_path: Path, step: int, recipe: dict[str, Any]) -> None:
    config = replace(CONFIG, **recipe)
    uninterrupted = Line()
    history = run(uninterrupted, tmp_path / "uninterrupted", config)
    with pytest.raises(RuntimeError, match="crash"):
        run(Line(crash_at(step)), tmp_path / "crashed", config)
    resumed = Line()
    for row, expected_row in zip(run(resumed, tmp_path / "crashed", config), history, strict=True):
        assert all(row[name] == expected_row[name] for name in ("epoch", "loss", "error", "learning_rate"))
    for expected, got in zip(weights(uninterrupted), weights(resumed), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_after_the_step_and_the_run_resumes(tmp_path: Path, number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted):
        run(Line(lambda step: os.kill(os.getpid(), number) if step == 2 else None), tmp_path / "stopped")
    assert signal.getsignal(number) == handler
    uninterrupted, resumed = Line(), Line()
    run(uninterrupted, tmp_path / "uninterrupted")
    run(resumed, tmp_path / "stopped")
    assert resumed._step == 3 * STEPS - 2
    for expected, got in zip(weights(uninterrupted), weights(resumed), strict=True):
        assert torch.equal(expected, got)


def test_finished_run_does_nothing(tmp_path: Path) -> None:
    history = run(Line(), tmp_path)
    again = Line()
    assert run(again, tmp_path) == history
    assert again._step == 0


@pytest.mark.parametrize("kept", [0, 5, 500])
def test_damaged_state_is_reported(tmp_path: Path, kept: int) -> None:
    run(Line(), tmp_path)
    state = tmp_path / "_training" / "state.pt"
    state.write_bytes(state.read_bytes()[:kept])
    with pytest.raises(DatasetError, match=r"_training/state\.pt cannot be read: .*--overwrite"):
        run(Line(), tmp_path)


@pytest.mark.parametrize("epochs", [3, 4])
def test_run_without_its_checkpoint_is_not_resumed(tmp_path: Path, epochs: int) -> None:
    run(Line(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    again = Line()
    with pytest.raises(DatasetError, match=r"does not hold the checkpoint of epoch \d, .*--overwrite"):
        run(again, tmp_path, replace(CONFIG, epochs=epochs))
    assert again._step == 0


def test_run_whose_folder_is_removed_at_the_end_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captionlib.training.loop.plot_curves", lambda *_: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(DatasetError, match="does not hold the checkpoint"):
        run(Line(), tmp_path / "run")


def test_run_can_be_extended_but_not_changed(tmp_path: Path) -> None:
    run(Line(), tmp_path)
    longer = Line()
    assert len(run(longer, tmp_path, replace(CONFIG, epochs=5))) == 5
    assert longer._step == 2 * STEPS
    with pytest.raises(DatasetError, match=r"training.learning_rate: was 0.001, now 0.1"):
        run(Line(), tmp_path, replace(CONFIG, learning_rate=0.1))


def test_best_epoch_is_saved_and_patience_ends_the_run(tmp_path: Path) -> None:
    objective = Line()
    objective.errors = [3.0, 1.0, 2.0, 1.5, 0.1]
    history = run(objective, tmp_path, replace(CONFIG, epochs=5, patience=2))
    assert [row["error"] for row in history] == [3.0, 1.0, 2.0, 1.5]
    assert objective.saved == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_first_of_equally_good_epochs_is_kept(tmp_path: Path) -> None:
    objective = Line()
    objective.errors = [2.0, 1.0, 1.0, 1.0, 0.1]
    history = run(objective, tmp_path, replace(CONFIG, epochs=5, patience=2))
    assert objective.saved == [1, 2]
    assert len(history) == 4  # an equally good epoch does not reset the patience


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, value: float) -> None:
    class Diverging(Line):
        def loss(self, batch: Tensor) -> BatchLoss:
            loss = super().loss(batch)
            return loss._replace(total=value) if self._step == STEPS + 2 else loss

    objective = Diverging()
    with pytest.raises(TrainingDiverged, match=rf"finite loss, got {value} in epoch 2; the checkpoint of epoch 1 is"):
        run(objective, tmp_path)
    assert objective.saved == [1]
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_epoch_with_a_non_finite_score_is_never_saved(tmp_path: Path) -> None:
    objective = Line()
    objective.higher_is_better = True  # NaN and infinity compare differently for each direction
    objective.errors = [float("inf")]
    with pytest.raises(TrainingDiverged, match=r"finite error, got inf in epoch 1; .* holds no checkpoint yet"):
        run(objective, tmp_path)
    assert objective.saved == []


class Unigram(Line):
    """Reports given validation perplexities. The perplexity of the unigram model is 10."""

    score_name = "perplexity"
    unigram_perplexity = 10.0

    def validate(self) -> dict[str, float]:
        return {"perplexity": self.errors.pop(0)}


@pytest.mark.parametrize("errors", [[12.0, 11.0, 10.1], [9.0, 12.0, 11.0, 10.1]])
def test_run_above_the_unigram_perplexity_stops(tmp_path: Path, errors: list[float]) -> None:
    objective = Unigram()
    objective.errors = [*errors, 1.0]
    config = replace(CONFIG, epochs=9)
    with pytest.raises(TrainingDiverged, match=r"below 10\.0, .* got 12\.0, 11\.0, 10\.1 in the last 3 epochs"):
        run(objective, tmp_path, config)
    assert objective.errors == [1.0]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == len(errors)
    with pytest.raises(TrainingDiverged):  # the same command fails at once
        run(objective, tmp_path, config)
    assert objective.errors == [1.0]
    continued = run(objective, tmp_path, replace(config, epochs=len(errors) + 1, unigram_patience=None))
    assert continued[-1]["perplexity"] == 1.0


def test_short_run_above_the_unigram_perplexity_ends_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Unigram()
    objective.errors = [12.0, 13.0]
    run(objective, tmp_path, replace(CONFIG, epochs=2))
    assert capsys.readouterr().err.startswith("warning: expected a validation perplexity below 10.0")


def test_run_that_falls_below_the_unigram_perplexity_continues(tmp_path: Path) -> None:
    objective = Unigram()
    objective.errors = [12.0, 11.0, 9.0, 8.0]
    assert len(run(objective, tmp_path, replace(CONFIG, epochs=4))) == 4


def test_higher_score_can_be_better(tmp_path: Path) -> None:
    objective = Line()
    objective.higher_is_better = True
    objective.errors = [-3.0, 1.0, 0.5, 0.7, 9.0]
    run(objective, tmp_path, replace(CONFIG, epochs=5, patience=2))
    assert objective.saved == [1, 2]


def test_averaged_weights_are_validated_and_saved_but_not_trained(tmp_path: Path) -> None:
    class Watched(Line):
        def validate(self) -> dict[str, float]:
            seen["validated"] = weights(self)
            return {"error": 1.0}

        def save(self, output: Folder, training: dict[str, Any]) -> None:
            super().save(output, training)
            seen["saved"] = weights(self)

    seen: dict[str, list[Tensor]] = {}
    plain, averaged = Line(), Watched()
    run(plain, tmp_path / "plain", replace(CONFIG, epochs=1))
    run(averaged, tmp_path / "averaged", replace(CONFIG, epochs=1, ema_decay=0.9))
    for trained, same, validated, saved in zip(
        weights(plain), weights(averaged), seen["validated"], seen["saved"], strict=True
    ):
        assert torch.equal(trained, same)
        assert torch.equal(validated, saved)
        assert not torch.equal(trained, saved)


def test_bfloat16_applies_to_the_loss_but_not_to_weights_or_validation(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    class Watched(Line):
        def loss(self, batch: Tensor) -> BatchLoss:
            seen.add(self.model(batch).dtype)
            return super().loss(batch)

        def validate(self) -> dict[str, float]:
            assert self.model(torch.ones(1, 3)).dtype == torch.float32
            return super().validate()

    objective = Watched()
    run(objective, tmp_path, replace(CONFIG, precision="bfloat16"))
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in objective.model.parameters()} == {torch.float32}


def test_run_logs_metrics_and_events(tmp_path: Path) -> None:
    history = run(Line(), tmp_path)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    assert json.loads((tmp_path / "resolved.json").read_bytes())["training"]["epochs"] == CONFIG.epochs
    assert all(0 <= row["data_wait_fraction"] <= 1 for row in history)
    events = [event for path in sorted((tmp_path / "tensorboard").iterdir()) for event in read_events(path)]
    losses = [
        (event.step, value.simple_value) for event in events for value in event.summary.value if value.tag == "loss"
    ]
    assert losses == [(row["epoch"], pytest.approx(row["loss"])) for row in history]


def read_events(path: Path) -> Iterator[Any]:
    """Yields the events of a file, whose records are: length, its checksum, the event, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_gradients_are_clipped(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(Line):
        def loss(self, batch: Tensor) -> BatchLoss:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            seen.extend(float(gradient.abs().max()) for gradient in gradients)
            loss = super().loss(batch)
            return loss._replace(mean=1e6 * loss.mean)

    run(Watched(), tmp_path / "value", replace(CONFIG, clip_value=5.0))
    assert max(seen) == 5.0
    seen.clear()
    run(Watched(), tmp_path / "norm", replace(CONFIG, clip_value=None, clip_norm=0.5))
    assert max(seen) <= 0.5


def test_folder_with_foreign_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match=r"files that do not belong to a training run \(thesis.txt\)"):
        check_run_folder(Folder(tmp_path))
    (tmp_path / "thesis.txt").unlink()
    run(Line(), tmp_path)
    delete_run(Folder(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
