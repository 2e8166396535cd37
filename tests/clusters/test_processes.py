import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.processes import ClusterError, Processes, wait_for

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
PARENT = [sys.executable, "-c", f"import subprocess; subprocess.run({SLEEP!r})"]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(tmp_path)
    yield started
    started.stop()


def test_another_object_can_find_and_stop_a_process(processes: Processes) -> None:
    processes.start("one", SLEEP)
    processes.wait_ready("one", lambda: "up" in processes.log("one").read_text(encoding="utf-8"))
    other = Processes(processes.folder)
    assert other.is_running("one")
    with pytest.raises(ClusterError, match="one is already running"):
        other.start("one", SLEEP)
    with pytest.raises(ClusterError, match="still running"):
        other.require_none()
    assert other.stop() == ["one"]
    assert not processes.is_running("one")
    assert other.stop() == []


def test_stop_also_ends_children_of_a_killed_process(processes: Processes) -> None:
    processes.start("parent", PARENT)
    processes.wait_ready("parent", lambda: len(processes.list_session("parent")) == 2)
    children = set(processes.list_session("parent")) - {processes.pid("parent")}
    processes.kill("parent")
    assert not processes.is_running("parent")
    (name,) = processes.list_names()
    assert set(processes.list_session(name)) == children
    processes.stop()
    for pid in children:
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists() or "Z" in _state(pid), 10, "the child to exit")


def test_a_reused_pid_is_not_killed(processes: Processes) -> None:
    processes.start("one", SLEEP)
    pid = processes.pid("one")
    (processes.folder / "pids" / "one").write_text(f"{pid} Mon Jan  1 00:00:00 2001", encoding="utf-8")
    assert not processes.is_running("one")
    assert processes.stop() == []
    os.kill(pid, 0)  # raises if the process is gone
    os.kill(pid, signal.SIGKILL)


def test_a_process_that_exits_before_it_is_ready_is_reported_with_its_log(processes: Processes) -> None:
    processes.start("broken", [sys.executable, "-c", "raise SystemExit('no such port')"])
    with pytest.raises(ClusterError, match=r"broken exited unexpectedly(.|\n)*no such port"):
        processes.wait_ready("broken", lambda: False)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[-1]
