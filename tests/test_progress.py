import sys

import pytest

from captionlib import progress
from captionlib.progress import progress_bar


def test_log_gets_a_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("prepare", None, "images") as bar:
        assert list(bar.track("abc")) == ["a", "b", "c"]
        bar.update(1000, "2 skipped")
    assert capsys.readouterr().err.startswith("prepare: 1,003 images, ")


def test_log_gets_lines_at_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", -1.0)
    with progress_bar("train", 10, "batches") as bar:
        bar.update(4, "loss 0.5")
        bar.update(6)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" batches")[0] for line in lines] == ["train: 4/10", "train: 10/10", "train: 10/10"]
    assert all(line.endswith("loss 0.5") for line in lines)


def test_skipped_work_does_not_count_towards_the_rate() -> None:
    with progress_bar("train", 10, "batches", enabled=False) as bar:
        bar.skip(10)
        assert bar.describe() == "10/10 batches, 0.0 batches/s"


def test_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("train", 10, "batches") as bar:
        bar.update(10)
    assert "10/10 batches" in capsys.readouterr().err


def test_disabled_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("train", 10, "batches", enabled=False) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
