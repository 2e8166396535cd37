import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from captionlib.data.shards.dataset import ShardedDataset
from captionlib.models.checkpoints.checkpoint import load_captioner

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


def start(
    features: ShardedDataset, output: Path, processes: int, overrides: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    """Starts `captionlib train-captioner`, under torchrun for more than one process."""
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(CONFIG))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "jobs.cli", "train-captioner"]
    command += [
        features.folder.uri,
        "--output",
        str(output),
        "--device",
        "cpu",
        "--no-progress",
        "--config",
        str(config),
    ]
    command += [word for override in overrides for word in ("--set", override)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run: "subprocess.Popen[str]") -> str:
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    return output


def history(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_captioner(output).model.state_dict()


@pytest.fixture
def running() -> Iterator[list["subprocess.Popen[str]"]]:
    runs: list[subprocess.Popen[str]] = []
    yield runs
    for run in runs:
        if run.poll() is None:
            run.kill()


def test_two_processes_equal_one_with_the_doubled_batch(features: ShardedDataset, tmp_path: Path) -> None:
    finish(start(features, tmp_path / "one", 1, ["batch_images=20"]))
    report = finish(start(features, tmp_path / "two", 2))
    assert report.count("after epoch") == 1  # only one process reports
    for alone, together in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        for name in ("epoch", "loss", "perplexity", "learning_rate"):
            assert alone[name] == pytest.approx(together[name], rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, values in one.items():
        torch.testing.assert_close(values, two[name], rtol=1e-2, atol=1e-4)


def test_two_processes_sample_like_one_with_the_doubled_batch(features: ShardedDataset, tmp_path: Path) -> None:
    finish(start(features, tmp_path / "first", 1, ["batch_images=20"]))
    second = ["objective=self_critical", f"init_from={tmp_path / 'first'}", "training.epochs=2"]
    finish(start(features, tmp_path / "one", 1, [*second, "batch_images=20"]))
    finish(start(features, tmp_path / "two", 2, second))
    for alone, together in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert alone["reward"] > 0
        for name in ("loss", "reward", "perplexity"):
            assert alone[name] == pytest.approx(together[name], rel=1e-3)


def test_two_stopped_processes_resume_bit_for_bit(
    features: ShardedDataset, tmp_path: Path, running: list["subprocess.Popen[str]"]
) -> None:
    dropout = [
        "captioner.dropout=0.3",
        "training.checkpoint_interval_seconds=0",
        "training.epochs=12",
    ]  # each process has its own
    finish(start(features, tmp_path / "uninterrupted", 2, dropout))
    stopped = start(features, tmp_path / "stopped", 2, dropout)
    running.append(stopped)
    while not (tmp_path / "stopped" / "_training" / "state.pt").exists() and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=200)
    assert stopped.returncode != 0
    finish(start(features, tmp_path / "stopped", 2, dropout))
    for before, after in zip(history(tmp_path / "uninterrupted"), history(tmp_path / "stopped"), strict=True):
        assert (before["loss"], before["perplexity"]) == (after["loss"], after["perplexity"])
    uninterrupted, resumed = weights(tmp_path / "uninterrupted"), weights(tmp_path / "stopped")
    assert all(torch.equal(values, resumed[name]) for name, values in uninterrupted.items())


def test_error_in_the_first_process_ends_all_processes(features: ShardedDataset, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    run = start(features, tmp_path / "thesis", 2)
    report, _ = run.communicate(timeout=100)
    assert run.returncode != 0
    assert "files that no training run wrote" in report
