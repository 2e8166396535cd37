from pathlib import Path

import pytest

from benchmarks.crash_recovery import count_identical_recoveries


@pytest.mark.timeout(280)
def test_runs_killed_at_random_moments_end_as_if_nobody_had_disturbed_them(tmp_path: Path) -> None:
    assert count_identical_recoveries(tmp_path, runs=4) == 4
