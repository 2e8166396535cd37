"""A standalone Flink cluster: one JobManager, two TaskManagers of one slot each, and Beam's job server."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from clusters.java import java_command, write_logging
from clusters.packages import FLINK, FLINK_RUNNER
from clusters.ports import answers, choose_ports, read_ports
from clusters.processes import Processes, wait_for
from clusters.workers import install_project, write_boot_script

__all__ = ["FlinkCluster"]

TASK_MANAGERS = 2

# A TaskManager that is started without Flink's shell scripts wants every part of its memory by name.
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
    """The cluster of a folder, whether it runs or not.

    Args:
        folder: for its configuration, pids, logs and temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes = Processes(folder)

    @property
    def beam_options(self) -> dict[str, Any]:
        """What Beam is told to submit to it."""
        return {
            "runner": "PortableRunner",
            "job_endpoint": f"127.0.0.1:{self._ports['job']}",
            "environment_type": "PROCESS",
            "environment_config": {"command": str(self.folder / "boot")},
            "experiments": "disable_logging_submission_environment",  # which asks for pip
            "parallelism": TASK_MANAGERS,
        }

    @property
    def address(self) -> str:
        """Where a browser sees it."""
        return f"http://127.0.0.1:{self._ports['rest']}"

    def start(self, restart_attempts: int = 10) -> None:
        """Starts everything and waits until jobs can be submitted.

        Args:
            restart_attempts: how often Flink runs a job's stage again after a fault before it gives the job up.
        """
        install_project()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes.require_none()
        choose_ports(self.folder, {"rest": 8081, "rpc": 6123, "job": 8099, "artifact": 8098, "expansion": 8097})
        write_boot_script(self.folder)
        write_logging(self.folder)
        self._write_configuration(restart_attempts)
        self._start_job_manager()
        for number in range(1, TASK_MANAGERS + 1):
            self.start_task_manager(f"task-manager-{number}")
        self._start_job_server()
        self.wait_for_task_managers(TASK_MANAGERS)

    def stop(self) -> list[str]:
        """Stops everything, workers included; returns what ran."""
        return self.processes.stop()

    def start_task_manager(self, name: str) -> None:
        """Starts a TaskManager, which joins the cluster by itself."""
        self._start_flink(name, "org.apache.flink.runtime.taskexecutor.TaskManagerRunner", 512)

    def running_task_managers(self) -> list[str]:
        """The names of their processes."""
        names = (f"task-manager-{number}" for number in range(1, TASK_MANAGERS + 1))
        return [name for name in names if self.processes.is_running(name)]

    def wait_for_task_managers(self, count: int) -> None:
        wait_for(lambda: len(self.task_managers()) == count, 90, f"{count} TaskManagers to register")

    def task_managers(self) -> list[str]:
        """The ids of those that are registered."""
        return [manager["id"] for manager in self.ask("taskmanagers")["taskmanagers"]]

    def jobs(self) -> list[dict[str, Any]]:
        """What Flink says of its jobs, the oldest first."""
        jobs: list[dict[str, Any]] = self.ask("jobs/overview")["jobs"]
        return sorted(jobs, key=lambda job: job["start-time"])

    def faults(self, job: str) -> list[str]:
        """Why Flink had to run parts of a job again, the last first."""
        history = self.ask(f"jobs/{job}/exceptions")["exceptionHistory"]["entries"]
        return [entry["exceptionName"] for entry in history]

    def shards_by_task_manager(self, job: str, step: str) -> dict[str, int]:
        """How many shards each TaskManager took in a step of a job."""
        (stage,) = [one for one in self.ask(f"jobs/{job}")["vertices"] if step in one["name"]]
        managers = self.ask(f"jobs/{job}/vertices/{stage['id']}/taskmanagers")["taskmanagers"]
        return {manager["taskmanager-id"]: manager["metrics"]["read-records"] for manager in managers}

    def ask(self, path: str) -> Any:
        """An answer of Flink's REST interface."""
        with urllib.request.urlopen(f"{self.address}/{path}", timeout=10) as answer:
            return json.load(answer)

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
        self.processes.wait_ready(name, lambda: answers(self._ports["rest"]))

    def _start_flink(self, name: str, main: str, megabytes: int) -> None:
        arguments = ["--configDir", str(self.folder / "conf")]
        logging = self.folder / "log4j2.properties"
        self.processes.start(name, java_command(main, [FLINK.fetch()], logging, arguments, megabytes))

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
        logging = self.folder / "log4j2.properties"
        self.processes.start(name, java_command(main, jars, logging, arguments, 512))
        self.processes.wait_ready(name, lambda: answers(ports["job"]))
