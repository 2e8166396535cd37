"""Whatever is killed, the rows are those of a run that nobody disturbed: the engine sees to it, or the same command."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clusters.flink import FlinkCluster
from clusters.flow import Flow
from clusters.processes import ClusterError, wait_for
from clusters.tests.conftest import SHARDS
from pipelines.beam_options import to_flags

DONE_BEFORE = 3  # shards that are published when the fault strikes


@contextmanager
def at_work(flow: Flow, stage: str, output: str, flink: FlinkCluster) -> Iterator["subprocess.Popen[str]"]:
    """A command whose job has published some of its shards, and not all."""
    with flow.start(stage, output, list(to_flags(flink.beam_options, "flink"))) as command:
        try:
            wait_for(
                lambda: flow.count_done(stage, output) >= DONE_BEFORE or command.poll() is not None,
                900,
                f"the first shards of {stage}",
            )
            done = flow.count_done(stage, output)
            assert DONE_BEFORE <= done < SHARDS, f"{done} of {SHARDS} shards done: not in the midst of the work"
            yield command
        finally:
            command.kill()


def kill_a_worker(flink: FlinkCluster) -> None:
    """Kills one of the Python processes that do the work, as a machine without memory would."""
    groups = [flink.processes.members(name) for name in flink.running_task_managers()]
    workers = [pid for group in groups for pid, line in group.items() if "sdk_worker_main" in line]
    assert workers, f"no worker runs among {groups}"
    os.kill(workers[0], signal.SIGKILL)


def finish(command: "subprocess.Popen[str]") -> str:
    """Waits for a command that should end well; returns what it printed."""
    printed, _ = command.communicate(timeout=900)
    assert command.returncode == 0, printed
    return printed


def test_a_worker_process_is_killed(flow: Flow, flink: FlinkCluster) -> None:
    stage = "extract-features"
    with at_work(flow, stage, "worker-killed", flink) as command:
        kill_a_worker(flink)
        finish(command)
    assert flow.compare(stage, "worker-killed") == []
    assert flink.faults(flink.jobs()[-1]["jid"]), "Flink has noticed"


def test_a_task_manager_is_killed_and_another_joins(flow: Flow, flink: FlinkCluster) -> None:
    stage = "generate-captions"
    with at_work(flow, stage, "task-manager-killed", flink) as command:
        victim = flink.running_task_managers()[0]
        flink.processes.kill(victim)
        flink.start_task_manager(victim)
        finish(command)
    assert flow.compare(stage, "task-manager-killed") == []
    assert flink.faults(flink.jobs()[-1]["jid"]), "Flink has noticed"


def test_the_submitting_command_is_killed(flow: Flow, flink: FlinkCluster) -> None:
    stage, output = "extract-features", "command-killed"
    with at_work(flow, stage, output, flink) as command:
        command.kill()
    wait_for(lambda: flow.is_complete(stage, output), 900, "the cluster to finish the job that nobody waits for")
    assert flow.compare(stage, output) == []
    jobs = len(flink.jobs())
    flow.run(stage, output, list(to_flags(flink.beam_options, "flink")))
    assert len(flink.jobs()) == jobs, "nothing was left to submit"


def test_the_whole_cluster_is_killed_and_started_again(flow: Flow, flink: FlinkCluster) -> None:
    stage, output = "generate-captions", "cluster-killed"
    with at_work(flow, stage, output, flink) as command:
        for name in flink.processes.names():
            if flink.processes.is_running(name):
                flink.processes.kill(name)
        command.communicate(timeout=900)
        assert command.returncode not in {0, None}
    flink.stop()
    done = flow.count_done(stage, output)
    assert done < SHARDS
    flink.start()
    flow.run(stage, output, list(to_flags(flink.beam_options, "flink")))
    assert flow.compare(stage, output) == []
    shards = flink.shards_by_task_manager(flink.jobs()[-1]["jid"], "Process")
    assert sum(shards.values()) == SHARDS - done, "what was done was not done again"


def test_an_index_survives_a_killed_worker(flow: Flow, flink: FlinkCluster) -> None:
    for name in ("captions", "embeddings"):
        (flow.folder / "index-killed").mkdir(exist_ok=True)
        (flow.folder / "index-killed" / name).symlink_to(flow.folder / "local" / name)
    with at_work(flow, "build-index", "index-killed", flink) as command:
        kill_a_worker(flink)
        finish(command)
    assert flow.compare("build-index", "index-killed") == []


def test_an_engine_that_does_not_try_again_is_submitted_to_again(flow: Flow, tmp_path: Path) -> None:
    stage, output, flink = "extract-features", "given-up", FlinkCluster(tmp_path)
    try:
        flink.start(restart_attempts=0)
        with at_work(flow, stage, output, flink) as command:
            kill_a_worker(flink)
            printed, _ = command.communicate(timeout=900)
        assert command.returncode == 1
        assert "Error: PortableRunner did not finish extract-features" in printed
        assert "Run the same command again" in printed
        assert flow.compare(stage, output) != []
        flow.run(stage, output, list(to_flags(flink.beam_options, "flink")))
    finally:
        flink.stop()
    assert flow.compare(stage, output) == []


def test_a_cluster_that_is_not_there_is_told(flow: Flow) -> None:
    nowhere = ["--runner=PortableRunner", "--job_endpoint=127.0.0.1:9", "--job_server_timeout=1"]
    with pytest.raises(ClusterError, match="Error: PortableRunner did not finish extract-features"):
        flow.run("extract-features", "nowhere", [*nowhere, "--environment_type=LOOPBACK"])
