"""A standalone Flink cluster: one JobManager, two TaskManagers of one slot each, and Beam's job server."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from clusters.java import java_command, write_log4j_config
from clusters.packages import FLINK, FLINK_RUNNER
from clusters.ports import choose_ports, is_listening, read_ports
from clusters.processes import Processes, wait_for
from clusters.workers import install_project, write_boot_script

__all__ = ["FlinkCluster"]

TASK_MANAGERS = 2

# Flink's shell scripts normally compute these sizes. The TaskManagers here are started without the scripts.
_TASK_MANAGER_MEMORY = {
    "framework.heap.size": "128m",
    "framework.off-heap.size": "128m",
    "task.heap.size": "384m",
    "task.off-heap.size": "0m",
    "managed.size": "128m",
    "network.min": "64m",
    "network.max": "64m",
    "jvm-metaspace.size": "256m",
    "jvm-overhead.min": "192m",
    "jvm-overhead.max": "192m",
}


class FlinkCluster:
    """A Flink cluster. Its state is stored in a folder, so that other processes can stop it.

    Args:
        folder: folder for configuration, pid files, logs and temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder)

    @property
    def beam_options(self) -> dict[str, Any]:
        """Beam options that submit jobs to the cluster."""
        return {
            "runner": "PortableRunner",
            "job_endpoint": f"127.0.0.1:{self._ports['job']}",
            "environment_type": "PROCESS",
            "environment_config": {"command": str(self.folder / "boot")},
            "experiments": "disable_logging_submission_environment",  # it would run pip
            "parallelism": TASK_MANAGERS,
        }

    @property
    def web_address(self) -> str:
        """Address of the web interface."""
        return f"http://127.0.0.1:{self._ports['rest']}"

    def start(self, restart_attempts: int = 10) -> None:
        """Starts all processes and waits until jobs can be submitted.

        Args:
            restart_attempts: number of times that Flink restarts a failed job. If 0, the job fails immediately.
        """
        install_project()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes.require_none()
        choose_ports(self.folder, {"rest": 8081, "rpc": 6123, "job": 8099, "artifact": 8098, "expansion": 8097})
        write_boot_script(self.folder)
        write_log4j_config(self.folder)
        self._write_configuration(restart_attempts)
        self._start_job_manager()
        for number in range(1, TASK_MANAGERS + 1):
            self.start_task_manager(f"task-manager-{number}")
        self._start_job_server()
        self.wait_for_task_managers(TASK_MANAGERS)

    def stop(self) -> list[str]:
        """Stops all processes, including workers, and returns the names of those that were running."""
        return self.processes.stop()

    def start_task_manager(self, name: str) -> None:
        """Starts a TaskManager, which registers itself with the JobManager."""
        self._start_flink(name, "org.apache.flink.runtime.taskexecutor.TaskManagerRunner", 512)

    def list_running_task_managers(self) -> list[str]:
        """Returns the process names of the running TaskManagers."""
        names = (f"task-manager-{number}" for number in range(1, TASK_MANAGERS + 1))
        return [name for name in names if self.processes.is_running(name)]

    def wait_for_task_managers(self, count: int) -> None:
        """Waits until `count` TaskManagers are registered."""
        wait_for(lambda: len(self.list_task_managers()) == count, 90, f"{count} TaskManagers to register")

    def list_task_managers(self) -> list[str]:
        """Returns the ids of the registered TaskManagers."""
        return [manager["id"] for manager in self._get("taskmanagers")["taskmanagers"]]

    def list_jobs(self) -> list[dict[str, Any]]:
        """Returns the overview of all jobs, oldest first."""
        jobs: list[dict[str, Any]] = self._get("jobs/overview")["jobs"]
        return sorted(jobs, key=lambda job: job["start-time"])

    def list_exceptions(self, job: str) -> list[str]:
        """Returns the exceptions after which Flink restarted parts of a job, latest first."""
        history = self._get(f"jobs/{job}/exceptions")["exceptionHistory"]["entries"]
        return [entry["exceptionName"] for entry in history]

    def count_shards_by_task_manager(self, job: str, step: str) -> dict[str, int]:
        """Returns the number of shards that each TaskManager read in a step of a job."""
        (stage,) = [vertex for vertex in self._get(f"jobs/{job}")["vertices"] if step in vertex["name"]]
        managers = self._get(f"jobs/{job}/vertices/{stage['id']}/taskmanagers")["taskmanagers"]
        return {manager["taskmanager-id"]: manager["metrics"]["read-records"] for manager in managers}

    def _get(self, path: str) -> Any:
        """Returns a response of Flink's REST API."""
        with urllib.request.urlopen(f"{self.web_address}/{path}", timeout=10) as response:
            return json.load(response)

    @property
    def _ports(self) -> dict[str, int]:
        return read_ports(self.folder)

    def _write_configuration(self, restart_attempts: int) -> None:
        local = "127.0.0.1"
        configuration = {
            "jobmanager.rpc.address": local,
            "jobmanager.rpc.port": self._ports["rpc"],
            "jobmanager.bind-host": local,
            "rest.address": local,
            "rest.bind-address": local,
            "rest.port": self._ports["rest"],
            "taskmanager.host": local,
            "taskmanager.bind-host": local,
            "taskmanager.numberOfTaskSlots": 1,
            "taskmanager.cpu.cores": 1.0,
            **{f"taskmanager.memory.{name}": size for name, size in _TASK_MANAGER_MEMORY.items()},
            "io.tmp.dirs": str(self.folder / "tmp"),
            "heartbeat.interval": 2000,
            "heartbeat.timeout": 8000,
            "restart-strategy.type": "fixed-delay" if restart_attempts else "none",
            "restart-strategy.fixed-delay.attempts": max(1, restart_attempts),
            "restart-strategy.fixed-delay.delay": "2 s",
        }
        (self.folder / "tmp").mkdir(exist_ok=True)
        (self.folder / "conf").mkdir(exist_ok=True)
        (self.folder / "conf" / "config.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")

    def _start_job_manager(self) -> None:
        name, main = "job-manager", "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        self._start_flink(name, main, 384)
        self.processes.wait_ready(name, lambda: is_listening(self._ports["rest"]))

    def _start_flink(self, name: str, main: str, megabytes: int) -> None:
        arguments = ["--configDir", str(self.folder / "conf")]
        log4j_config = self.folder / "log4j2.properties"
        self.processes.start(name, java_command(main, [FLINK.fetch()], log4j_config, arguments, megabytes))

    def _start_job_server(self) -> None:
        ports, name = self._ports, "job-server"
        arguments = [
            f"--flink-master=127.0.0.1:{ports['rest']}",
            "--job-host=127.0.0.1",
            f"--job-port={ports['job']}",
            f"--artifact-port={ports['artifact']}",
            f"--expansion-port={ports['expansion']}",
            f"--artifacts-dir={self.folder / 'tmp' / 'artifacts'}",
        ]
        main = "org.apache.beam.runners.flink.FlinkJobServerDriver"
        jars = [FLINK_RUNNER.fetch(), *FLINK.fetch().glob("log4j-*.jar")]
        log4j_config = self.folder / "log4j2.properties"
        self.processes.start(name, java_command(main, jars, log4j_config, arguments, 512))
        self.processes.wait_ready(name, lambda: is_listening(ports["job"]))
