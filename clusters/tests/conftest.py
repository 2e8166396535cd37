from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.flink import FlinkCluster
from clusters.flow import Flow

IMAGES, SHARD_SIZE = 160, 8
SHARDS = IMAGES // SHARD_SIZE


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """Prepares the flow and runs it on this machine, without faults."""
    flow = Flow(tmp_path_factory.mktemp("flow"))
    flow.prepare(IMAGES, SHARD_SIZE)
    return flow


@pytest.fixture(scope="session")
def flink_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("flink")
    yield folder
    FlinkCluster(folder).stop()


@pytest.fixture
def flink(flink_folder: Path) -> FlinkCluster:
    """Returns a cluster with both TaskManagers running, regardless of what the previous test did."""
    cluster = FlinkCluster(flink_folder)
    if not cluster.processes.is_running("job-manager"):
        cluster.start()
    cluster.wait_for_task_managers(2)
    return cluster
