import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.models.checkpoints.checkpoint import load_captioner
from tests.training.processes import TrainingRun

CONFIG: dict[str, Any] = {
    "captioner": {"hidden_size": 16, "embedding_size": 16, "dropout": 0.0},
    "training": {
        "epochs": 4,
        "optimizer": "adam",
        "learning_rate": 0.01,
        "clip_norm": 0.5,
        "ema_decay": 0.9,
        "warmup_steps": 4,
        "schedule": "cosine",
        "patience": None,
    },
    "min_count": 1,
    "batch_images": 10,
}


def start(features: ShardedDataset, output: Path, processes: int, overrides: Sequence[str] = ()) -> TrainingRun:
    """Starts `captionlib train-captioner`."""
    return TrainingRun(command(features, output, overrides), output.with_suffix(".log"), processes)


def command(features: ShardedDataset, output: Path, overrides: Sequence[str] = ()) -> list[str]:
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(CONFIG))
    arguments = ["train-captioner", features.folder.uri, "--output", str(output), "--config", str(config)]
    arguments += ["--device", "cpu", "--no-progress"]
    return arguments + [word for override in overrides for word in ("--set", override)]


def history(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_captioner(output).model.state_dict()


def test_two_processes_equal_one_with_the_doubled_batch(features: ShardedDataset, tmp_path: Path) -> None:
    start(features, tmp_path / "one", 1, ["batch_images=20"]).finish()
    report = start(features, tmp_path / "two", 2).finish()
    assert report.count("after epoch") == 1  # only one process reports
    for alone, together in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        for name in ("epoch", "loss", "perplexity", "learning_rate"):
            assert alone[name] == pytest.approx(together[name], rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, values in one.items():
        torch.testing.assert_close(values, two[name], rtol=1e-2, atol=1e-4)


def test_two_processes_sample_like_one_with_the_doubled_batch(features: ShardedDataset, tmp_path: Path) -> None:
    start(features, tmp_path / "first", 1, ["batch_images=20"]).finish()
    second = ["objective=self_critical", f"init_from={tmp_path / 'first'}", "training.epochs=2"]
    start(features, tmp_path / "one", 1, [*second, "batch_images=20"]).finish()
    start(features, tmp_path / "two", 2, second).finish()
    for alone, together in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert alone["reward"] > 0
        for name in ("loss", "reward", "perplexity"):
            assert alone[name] == pytest.approx(together[name], rel=1e-3)


def test_two_stopped_processes_resume_bit_for_bit(
    features: ShardedDataset, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # Each process has its own dropout.
    dropout = ["captioner.dropout=0.3", "training.checkpoint_interval_seconds=0", "training.epochs=6"]
    start(features, tmp_path / "uninterrupted", 2, dropout).finish()
    stopped = start(features, tmp_path / "stopped", 2, dropout)
    request.addfinalizer(stopped.kill)
    while not (tmp_path / "stopped" / "_training" / "state.pt").exists() and stopped.is_alive():
        time.sleep(0.01)
    stopped.terminate()
    assert stopped.wait() == [143, 143]
    start(features, tmp_path / "stopped", 2, dropout).finish()
    for before, after in zip(history(tmp_path / "uninterrupted"), history(tmp_path / "stopped"), strict=True):
        assert (before["loss"], before["perplexity"]) == (after["loss"], after["perplexity"])
    uninterrupted, resumed = weights(tmp_path / "uninterrupted"), weights(tmp_path / "stopped")
    assert all(torch.equal(values, resumed[name]) for name, values in uninterrupted.items())


def test_error_in_the_first_process_ends_all_processes(features: ShardedDataset, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(features, tmp_path / "thesis")
    done = subprocess.run(
        [*torchrun, "-m", "captionlib", *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode != 0
    assert "files that do not belong to a training run" in done.stderr
