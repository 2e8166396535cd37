import pytest

from clusters.flink import FlinkCluster
from clusters.flow import STAGES, Flow
from clusters.tests.conftest import SHARDS
from pipelines.beam_options import to_flags

STEPS = {"extract-features": "Process", "generate-captions": "Process", "build-index": "AddShard"}


@pytest.mark.parametrize("stage", STAGES)
def test_output_equals_the_local_output_and_both_task_managers_share_the_work(
    stage: str, flow: Flow, flink: FlinkCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    flow.run(stage, "flink", list(to_flags(flink.beam_options, "flink")))
    assert flow.compare(stage, "flink") == []
    shards = flink.count_shards_by_task_manager(flink.list_jobs()[-1]["jid"], STEPS[stage])
    with capsys.disabled():
        print(f"\n# {stage}: shards per TaskManager {shards}")
    assert sorted(shards.values()) == [SHARDS // 2, SHARDS // 2]
