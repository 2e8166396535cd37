"""Kills processes and checks the output: the engine recovers, or the same command resumes the run."""

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

MIN_FINISHED = 3  # shards that are published before the fault


@contextmanager
def run_partially(flow: Flow, stage: str, output: str, flink: FlinkCluster) -> Iterator["subprocess.Popen[str]"]:
    """Starts a command and yields it once its job has published some of its shards, but not all."""
    with flow.start(stage, output, list(to_flags(flink.beam_options, "flink"))) as command:
        try:
            wait_for(
                lambda: flow.count_finished_shards(stage, output) >= MIN_FINISHED or command.poll() is not None,
                900,
                f"the first shards of {stage}",
            )
            finished = flow.count_finished_shards(stage, output)
            assert MIN_FINISHED <= finished < SHARDS, f"{finished} of {SHARDS} shards finished"
            yield command
        finally:
            command.kill()


def kill_worker(flink: FlinkCluster) -> None:
    """Kills a Python worker process, as an out-of-memory killer would."""
    sessions = [flink.processes.list_session(name) for name in flink.list_running_task_managers()]
    workers = [pid for session in sessions for pid, command in session.items() if "sdk_worker_main" in command]
    assert workers, f"no worker is running among {sessions}"
    os.kill(workers[0], signal.SIGKILL)


def finish(command: "subprocess.Popen[str]") -> str:
    """Waits for a command, checks that it succeeded, and returns its output."""
    output, _ = command.communicate(timeout=900)
    assert command.returncode == 0, output
    return output


def test_flink_recovers_from_a_killed_worker(flow: Flow, flink: FlinkCluster) -> None:
    stage = "extract-features"
    with run_partially(flow, stage, "worker-killed", flink) as command:
        kill_worker(flink)
        finish(command)
    assert flow.compare(stage, "worker-killed") == []
    assert flink.list_exceptions(flink.list_jobs()[-1]["jid"]), "Flink must have restarted the job"


def test_flink_recovers_from_a_killed_task_manager(flow: Flow, flink: FlinkCluster) -> None:
    stage = "generate-captions"
    with run_partially(flow, stage, "task-manager-killed", flink) as command:
        victim = flink.list_running_task_managers()[0]
        flink.processes.kill(victim)
        flink.start_task_manager(victim)
        finish(command)
    assert flow.compare(stage, "task-manager-killed") == []
    assert flink.list_exceptions(flink.list_jobs()[-1]["jid"]), "Flink must have restarted the job"


def test_the_job_finishes_after_the_submitting_command_is_killed(flow: Flow, flink: FlinkCluster) -> None:
    stage, output = "extract-features", "command-killed"
    with run_partially(flow, stage, output, flink) as command:
        command.kill()
    wait_for(lambda: flow.is_complete(stage, output), 900, "the cluster to finish the orphaned job")
    assert flow.compare(stage, output) == []
    jobs = len(flink.list_jobs())
    flow.run(stage, output, list(to_flags(flink.beam_options, "flink")))
    assert len(flink.list_jobs()) == jobs, "a complete output must not submit a job"


def test_the_same_command_resumes_after_the_whole_cluster_is_killed(flow: Flow, flink: FlinkCluster) -> None:
    stage, output = "generate-captions", "cluster-killed"
    with run_partially(flow, stage, output, flink) as command:
        for name in flink.processes.list_names():
            if flink.processes.is_running(name):
                flink.processes.kill(name)
        command.communicate(timeout=900)
        assert command.returncode not in {0, None}
    flink.stop()
    finished = flow.count_finished_shards(stage, output)
    assert finished < SHARDS
    flink.start()
    flow.run(stage, output, list(to_flags(flink.beam_options, "flink")))
    assert flow.compare(stage, output) == []
    shards = flink.count_shards_by_task_manager(flink.list_jobs()[-1]["jid"], "Process")
    assert sum(shards.values()) == SHARDS - finished, "finished shards must not run again"


def test_build_index_recovers_from_a_killed_worker(flow: Flow, flink: FlinkCluster) -> None:
    for name in ("captions", "embeddings"):
        (flow.folder / "index-killed").mkdir(exist_ok=True)
        (flow.folder / "index-killed" / name).symlink_to(flow.folder / "local" / name)
    with run_partially(flow, "build-index", "index-killed", flink) as command:
        kill_worker(flink)
        finish(command)
    assert flow.compare("build-index", "index-killed") == []


def test_the_same_command_resumes_a_failed_job(flow: Flow, tmp_path: Path) -> None:
    stage, output, flink = "extract-features", "failed", FlinkCluster(tmp_path)
    try:
        flink.start(restart_attempts=0)
        with run_partially(flow, stage, output, flink) as command:
            kill_worker(flink)
            printed, _ = command.communicate(timeout=900)
        assert command.returncode == 1
        assert "Error: PortableRunner did not finish extract-features" in printed
        assert "Run the same command again" in printed
        assert flow.compare(stage, output) != []
        flow.run(stage, output, list(to_flags(flink.beam_options, "flink")))
    finally:
        flink.stop()
    assert flow.compare(stage, output) == []


def test_a_missing_cluster_is_an_error(flow: Flow) -> None:
    options = ["--runner=PortableRunner", "--job_endpoint=127.0.0.1:9", "--job_server_timeout=1"]
    with pytest.raises(ClusterError, match="Error: PortableRunner did not finish extract-features"):
        flow.run("extract-features", "missing", [*options, "--environment_type=LOOPBACK"])
