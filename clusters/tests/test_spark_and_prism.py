from pathlib import Path

import pytest

from clusters.engines import ENGINES
from clusters.flow import STAGES, Flow
from pipelines.beam_options import to_flags


@pytest.mark.parametrize("engine", ["spark", "prism"])
def test_output_equals_the_local_output(engine: str, flow: Flow, tmp_path: Path) -> None:
    cluster = ENGINES[engine](tmp_path)
    try:
        cluster.start()
        for stage in STAGES:
            flow.run(stage, engine, list(to_flags(cluster.beam_options, engine)))
            assert flow.compare(stage, engine) == []
    finally:
        cluster.stop()
