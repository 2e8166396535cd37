from pathlib import Path

import pytest

from benchmarks.crash_recovery import count_identical_recoveries


@pytest.mark.timeout(280)
def test_killed_runs_resume_with_identical_output(tmp_path: Path) -> None:
    assert count_identical_recoveries(tmp_path, runs=2) == 2
