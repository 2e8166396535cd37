from pathlib import Path

import pytest

from benchmarks.kills import survive_kills


@pytest.mark.timeout(280)
def test_runs_killed_at_random_moments_end_as_if_nobody_had_disturbed_them(tmp_path: Path) -> None:
    assert survive_kills(tmp_path, runs=4) == 4
