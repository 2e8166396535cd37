"""Runs training commands in processes that are forked from a server with the imported modules, which saves seconds."""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training.processes", "jobs.train_captioner", "jobs.train_ranker"])


class TrainingRun:
    """A command that runs in one or more processes, with the environment that `torchrun` sets.

    Args:
        arguments: the command and its arguments.
        log: a file for the output of all processes.
        processes: the number of processes.
    """

    def __init__(self, arguments: Sequence[str], log: Path, processes: int = 1) -> None:
        self._log = log
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        self._processes = []
        for rank in map(str, range(processes)):
            environment = {**group, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            process = _CONTEXT.Process(target=_run, args=(list(arguments), log, environment))
            process.start()
            self._processes.append(process)

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def wait(self) -> list[int | None]:
        """Returns the exit codes of all processes."""
        for process in self._processes:
            process.join(200)
        return [process.exitcode for process in self._processes]

    def finish(self) -> str:
        """Waits for success and returns the output."""
        codes, output = self.wait(), self._log.read_text()
        assert codes == [0] * len(codes), output
        return output

    def terminate(self) -> None:
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()


def _run(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    try:
        main(arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
