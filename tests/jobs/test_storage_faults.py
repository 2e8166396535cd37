"""Fails single accesses to files in a sample of commands.

If CAPTIONLIB_ALL_FAULTS is set, every access of every command fails in turn.
"""

import os
import random
from pathlib import Path

import pytest

from benchmarks.storage_faults import FAULTS, FaultWalk
from benchmarks.tiny_project import COMMANDS

QUICK = {"prepare", "embed", "build-index", "export", "inspect", "query"}


# The commands report the exception of a timeout as their own error, so a busy machine needs a generous limit.
@pytest.mark.timeout(0 if os.environ.get("CAPTIONLIB_ALL_FAULTS") else 1200)
def test_storage_faults_give_one_line_or_the_right_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes seconds to start
    everything = bool(os.environ.get("CAPTIONLIB_ALL_FAULTS"))
    walk = FaultWalk(tmp_path)
    points = walk.list_points([command for command in COMMANDS if everything or command.name in QUICK])
    assert {fault for _, fault, _ in points} == set(FAULTS)
    sample = points if everything else random.Random(0).sample(points, 15)
    problems = [outcome for outcome in (walk.run(*point) for point in sample) if outcome.problem]
    assert not problems
