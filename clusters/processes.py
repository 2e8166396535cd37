"""The processes of a cluster: started apart from the command that starts them, each with a pid file and a log.

folder/
  pids/NAME        pid, and when the process began, so that a pid that was given away again is never killed
  logs/NAME.log    what it printed
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
    """A cluster, or something that it is made of, is not what it should be."""


class Processes:
    """Named processes, each the leader of a session that its children belong to, in whatever process group.

    Args:
        folder: where their pids and logs are kept; it outlives the command that starts them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pids = folder / "pids"
        self._logs = folder / "logs"
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Starts a process; what it prints goes to the end of its log.

        Raises:
            ClusterError: a process of this name runs already.
        """
        if self.is_running(name):
            raise ClusterError(f"{name} runs already, as process {self.pid(name)}; stop it first: make cluster-down")
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
        (self._pids / name).write_text(f"{child.pid} {_began(child.pid)}", encoding="utf-8")
        return child.pid

    def log(self, name: str) -> Path:
        """What a process prints."""
        return self._logs / f"{name}.log"

    def names(self) -> list[str]:
        """The processes that were started and not stopped, whether they run or not."""
        return sorted(path.name for path in self._pids.iterdir()) if self._pids.is_dir() else []

    def pid(self, name: str) -> int:
        return int(self._read(name)[0])

    def is_running(self, name: str) -> bool:
        if name not in self.names():
            return False
        self._reap()
        pid, began = self._read(name)
        return _began(int(pid)) == began != ""

    def members(self, name: str) -> dict[int, str]:
        """A process and its children, by pid, with their command lines; children may outlive it."""
        pid, began = self._read(name)
        if _began(int(pid)) not in {began, ""}:
            return {}  # the number belongs to a stranger by now
        return {member: command for member, session, command in _processes() if session == int(pid)}

    def kill(self, name: str) -> None:
        """Kills one process at once, as a machine's failure would, but not its children; it may be started again."""
        os.kill(self.pid(name), signal.SIGKILL)
        wait_for(lambda: not self.is_running(name), 10, f"{name} to die")
        (self._pids / name).rename(self._pids / f"{name}-killed-{self.pid(name)}")

    def stop(self) -> list[str]:
        """Ends all processes and their children: asked first, killed after a while.

        Returns:
            The names of those that ran.
        """
        running = [name for name in self.names() if self.members(name)]
        for kind, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
            deadline = time.monotonic() + seconds
            for name in running:
                for pid in self.members(name):
                    with suppress(ProcessLookupError):
                        os.kill(pid, kind)
            while time.monotonic() < deadline and any(self.members(name) for name in running):
                self._reap()
                time.sleep(0.1)
        for name in self.names():
            (self._pids / name).unlink()
        return running

    def require_none(self) -> None:
        """Raises ClusterError where a process of the folder still runs."""
        if running := [name for name in self.names() if self.members(name)]:
            raise ClusterError(f"{', '.join(running)} in {self.folder} still run; stop them first: make cluster-down")

    def require_running(self, name: str) -> None:
        """Raises ClusterError, with the end of its log, where a process has ended."""
        if not self.is_running(name):
            tail = self.log(name).read_text(encoding="utf-8", errors="replace")[-2000:]
            raise ClusterError(f"{name} has ended; expected it to run. The end of {self.log(name)}:\n{tail}")

    def wait_ready(self, name: str, check: Callable[[], bool], seconds: float = 90.0) -> None:
        """Waits until `check` holds.

        Raises:
            ClusterError: the process ended, or it took too long.
        """

        def ready() -> bool:
            self.require_running(name)
            return check()

        wait_for(ready, seconds, f"{name} to be ready (its log: {self.log(name)})")

    def _read(self, name: str) -> tuple[str, str]:
        pid, _, began = (self._pids / name).read_text(encoding="utf-8").partition(" ")
        return pid, began

    def _reap(self) -> None:
        for child in self._children:
            child.poll()


def wait_for(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until `check` holds.

    Raises:
        ClusterError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:g} seconds for {what}")
        time.sleep(0.1)


def run_command(command: Sequence[str], folder: Path | None = None, **environment: str) -> None:
    """Runs a program to its end.

    Raises:
        ClusterError: it failed; with the end of what it printed.
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
        raise ClusterError(f"{' '.join(command)}: expected exit status 0, got {result.returncode}; it said:\n{output}")


def _began(pid: int) -> str:
    """When a process began, as `ps` tells it; empty where there is none, or only its exit status is left of it."""
    told = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return "" if not told or told[0].startswith("Z") else told[1].strip()


def _processes() -> list[tuple[int, int, str]]:
    """Pid, session and command line of all processes that run."""
    command = ["ps", "-e", "-ww", "-o", "pid=,sess=,stat=,args="]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = (line.split(maxsplit=3) for line in told.stdout.splitlines())
    return [(int(row[0]), int(row[1]), row[3]) for row in rows if len(row) == 4 and not row[2].startswith("Z")]
