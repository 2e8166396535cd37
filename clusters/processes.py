"""Manages the daemon processes of a cluster, each with a pid file and a log.

folder/
  pids/NAME        pid and start time; the start time shows whether the system has reused the pid
  logs/NAME.log    stdout and stderr
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["ClusterError", "Processes", "run_command", "wait_for"]

_STOP_SECONDS = 10.0


class ClusterError(Exception):
    """A cluster, or a program that it needs, failed."""


class Processes:
    """Named processes that outlive the command that starts them. Each leads a session, which contains its children.

    Args:
        folder: folder of the pid files and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pids = folder / "pids"
        self._logs = folder / "logs"
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Starts a process, appends its output to its log, and returns its pid.

        Raises:
            ClusterError: a process of this name is running.
        """
        if self.is_running(name):
            raise ClusterError(
                f"{name} is already running as process {self.pid(name)}; stop it first: make cluster-down"
            )
        self._pids.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            child = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        (self._pids / name).write_text(f"{child.pid} {_get_start_time(child.pid)}", encoding="utf-8")
        return child.pid

    def log(self, name: str) -> Path:
        """Returns the path of a process's log."""
        return self._logs / f"{name}.log"

    def list_names(self) -> list[str]:
        """Returns the names of all processes that were started but not stopped, even if they have exited."""
        return sorted(path.name for path in self._pids.iterdir()) if self._pids.is_dir() else []

    def pid(self, name: str) -> int:
        """Returns the pid of a process."""
        return int(self._read(name)[0])

    def is_running(self, name: str) -> bool:
        """Returns whether a process was started and has not exited."""
        if name not in self.list_names():
            return False
        self._reap()
        pid, start_time = self._read(name)
        return _get_start_time(int(pid)) == start_time != ""

    def list_session(self, name: str) -> dict[int, str]:
        """Returns pids and command lines of a process and its children, which may outlive it."""
        pid, start_time = self._read(name)
        if _get_start_time(int(pid)) not in {start_time, ""}:
            return {}  # the system has reused the pid
        return {member: command for member, session, command in _list_processes() if session == int(pid)}

    def kill(self, name: str) -> None:
        """Kills one process but not its children, as a machine failure would. It can be started again."""
        os.kill(self.pid(name), signal.SIGKILL)
        wait_for(lambda: not self.is_running(name), 10, f"{name} to exit")
        (self._pids / name).rename(self._pids / f"{name}-killed-{self.pid(name)}")

    def stop(self) -> list[str]:
        """Terminates all processes and their children, and kills those that do not exit in time.

        Returns:
            The names of the processes that were running.
        """
        running = [name for name in self.list_names() if self.list_session(name)]
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _STOP_SECONDS
            for name in running:
                for pid in self.list_session(name):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal_number)
            while time.monotonic() < deadline and any(self.list_session(name) for name in running):
                self._reap()
                time.sleep(0.1)
        for name in self.list_names():
            (self._pids / name).unlink()
        return running

    def require_none(self) -> None:
        """Raises ClusterError if a process of the folder is still running."""
        if running := [name for name in self.list_names() if self.list_session(name)]:
            raise ClusterError(
                f"{', '.join(running)} in {self.folder} are still running; stop them first: make cluster-down"
            )

    def require_running(self, name: str) -> None:
        """Raises ClusterError, with the end of its log, if a process has exited."""
        if not self.is_running(name):
            tail = self.log(name).read_text(encoding="utf-8", errors="replace")[-2000:]
            raise ClusterError(f"{name} exited unexpectedly. The end of {self.log(name)}:\n{tail}")

    def wait_ready(self, name: str, check: Callable[[], bool], seconds: float = 90.0) -> None:
        """Waits until `check` returns true.

        Raises:
            ClusterError: the process exited, or was not ready in time.
        """

        def ready() -> bool:
            self.require_running(name)
            return check()

        wait_for(ready, seconds, f"{name} to be ready (its log: {self.log(name)})")

    def _read(self, name: str) -> tuple[str, str]:
        pid, _, start_time = (self._pids / name).read_text(encoding="utf-8").partition(" ")
        return pid, start_time

    def _reap(self) -> None:
        for child in self._children:
            child.poll()


def wait_for(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until `check` returns true.

    Raises:
        ClusterError: `check` did not return true within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:g} seconds for {what}")
        time.sleep(0.1)


def run_command(command: Sequence[str], folder: Path | None = None, **environment: str) -> None:
    """Runs a program and waits for it.

    Raises:
        ClusterError: the program failed. The message contains the end of its output.
    """
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if result.returncode:
        output = result.stdout.decode(errors="replace")[-2000:]
        raise ClusterError(f"{' '.join(command)}: expected exit status 0, got {result.returncode}; output:\n{output}")


def _get_start_time(pid: int) -> str:
    """Returns the start time of a process as `ps` formats it; empty if the process has exited."""
    fields = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return "" if not fields or fields[0].startswith("Z") else fields[1].strip()


def _list_processes() -> list[tuple[int, int, str]]:
    """Returns pid, session and command line of all running processes."""
    command = ["ps", "-e", "-ww", "-o", "pid=,sess=,stat=,args="]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = (line.split(maxsplit=3) for line in listing.stdout.splitlines())
    return [(int(row[0]), int(row[1]), row[3]) for row in rows if len(row) == 4 and not row[2].startswith("Z")]
