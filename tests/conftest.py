import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from captionlib.evaluation import java


@pytest.fixture(scope="session", autouse=True)
def running_meteor() -> Iterator[None]:
    """Keeps METEOR running between calls, because it takes seconds to start."""
    run_java = java._run_java
    processes: list[subprocess.Popen[str]] = []

    def run(program: str, arguments: Sequence[str], lines: Sequence[str], folder: Path | None = None) -> list[str]:
        if program != "METEOR score" or not java.has_java():
            return run_java(program, arguments, lines, folder)
        if not processes:
            command = [*java._JAVA, *arguments]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, encoding="utf-8", bufsize=1
            )
            processes.append(process)
        (process,) = processes
        assert process.stdin is not None
        assert process.stdout is not None
        output = []
        for line in lines:
            process.stdin.write(f"{line}\n")
            output.append(process.stdout.readline().rstrip("\n"))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(java, "_run_java", run)
        yield
    for process in processes:
        process.kill()
        process.wait()
