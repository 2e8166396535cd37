"""A standalone Spark cluster: one master, two workers of one core each, and Beam's job server, which is the driver."""

import json
import urllib.request
from pathlib import Path
from typing import Any

from clusters.java import java_command, list_java_openings, write_log4j_config
from clusters.packages import SPARK, SPARK_RUNNER
from clusters.ports import choose_ports, is_listening, read_ports
from clusters.processes import Processes, wait_for
from clusters.workers import install_project, write_boot_script

__all__ = ["SparkCluster"]

WORKERS = 2


class SparkCluster:
    """A Spark cluster. Its state is stored in a folder, so that other processes can stop it.

    Args:
        folder: folder for pid files, logs and temporary files.
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
            "environment_cache_millis": 60000,  # keeps a worker alive for the next stage
            "experiments": "disable_logging_submission_environment",  # it would run pip
        }

    @property
    def web_address(self) -> str:
        """Address of the web interface."""
        return f"http://127.0.0.1:{self._ports['master-web']}"

    def start(self) -> None:
        """Starts all processes and waits until jobs can be submitted."""
        install_project()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes.require_none()
        preferred = {"master": 7077, "master-web": 8080, "job": 8199, "artifact": 8198, "expansion": 8197}
        choose_ports(self.folder, preferred)
        write_boot_script(self.folder)
        write_log4j_config(self.folder)
        home = self.folder / "jars"
        home.unlink(missing_ok=True)
        home.symlink_to(SPARK.fetch())
        self._start_master()
        for number in range(1, WORKERS + 1):
            self._start_worker(number)
        self._start_job_server()
        wait_for(lambda: len(self.list_workers()) == WORKERS, 90, f"{WORKERS} workers to register")

    def stop(self) -> list[str]:
        """Stops all processes, including executors, and returns the names of those that were running."""
        return self.processes.stop()

    def list_workers(self) -> list[str]:
        """Returns the ids of the workers that are registered and alive."""
        with urllib.request.urlopen(f"{self.web_address}/json/", timeout=10) as response:
            workers = json.load(response)["workers"]
        return [worker["id"] for worker in workers if worker["state"] == "ALIVE"]

    @property
    def _ports(self) -> dict[str, int]:
        return read_ports(self.folder)

    @property
    def _master(self) -> str:
        return f"spark://127.0.0.1:{self._ports['master']}"

    def _start_master(self) -> None:
        ports = self._ports
        web = ["--webui-port", str(ports["master-web"])]
        arguments = ["--host", "127.0.0.1", "--port", str(ports["master"]), *web]
        self._start("master", "org.apache.spark.deploy.master.Master", arguments, 256)
        self.processes.wait_ready("master", lambda: is_listening(ports["master"]) and is_listening(ports["master-web"]))

    def _start_worker(self, number: int) -> None:
        name = f"worker-{number}"
        arguments = ["--host", "127.0.0.1", "-c", "1", "-m", "1g", "-d", str(self.folder / name)]
        self._start(name, "org.apache.spark.deploy.worker.Worker", [*arguments, "--webui-port", "0", self._master], 256)

    def _start_job_server(self) -> None:
        ports = self._ports
        arguments = [
            f"--spark-master-url={self._master}",
            "--job-host=127.0.0.1",
            f"--job-port={ports['job']}",
            f"--artifact-port={ports['artifact']}",
            f"--expansion-port={ports['expansion']}",
            f"--artifacts-dir={self.folder / 'artifacts'}",
        ]
        spark = {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.executor.memory": "768m",
            "spark.executor.cores": "1",
            "spark.ui.enabled": "false",
            "spark.executor.extraJavaOptions": " ".join(list_java_openings()),
        }
        options = [f"-D{name}={value}" for name, value in spark.items()]
        self._start("job-server", "org.apache.beam.runners.spark.SparkJobServerDriver", arguments, 512, options)
        self.processes.wait_ready("job-server", lambda: is_listening(ports["job"]))

    def _start(
        self, name: str, main: str, arguments: list[str], megabytes: int, options: list[str] | None = None
    ) -> None:
        jars = [SPARK.fetch()]
        if name == "job-server":  # Beam's jars come first, except for Spark's version of slf4j
            jars = [*SPARK.fetch().glob("slf4j-api-*.jar"), SPARK_RUNNER.fetch(), SPARK.fetch()]
        log4j_config = self.folder / "log4j2.properties"
        command = java_command(main, jars, log4j_config, arguments, megabytes, options or [])
        # A worker starts executors with Spark's launcher, which needs Spark's jars in SPARK_HOME.
        environment = {"SPARK_HOME": str(self.folder), "SPARK_SCALA_VERSION": "2.12", "SPARK_LOCAL_IP": "127.0.0.1"}
        self.processes.start(name, command, environment)
