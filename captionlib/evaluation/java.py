"""Runs the Java programs that the field's scores are defined with; they come with pycocoevalcap."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from captionlib.errors import ConfigError, SubprocessError

__all__ = ["has_java", "run_java"]


def has_java() -> bool:
    """Whether there is a `java` on the PATH."""
    return shutil.which("java") is not None


def run_java(name: str, arguments: Sequence[str], lines: Sequence[str], folder: Path | None = None) -> list[str]:
    """What a program answers to lines of text, a line each.

    Args:
        name: what the program is, for messages.
        arguments: of `java`.
        lines: its input.
        folder: that it runs in.

    Raises:
        ConfigError: Java is not installed.
        SubprocessError: the program fails.
    """
    if not has_java():
        raise ConfigError(
            f"the {name} needs Java, and there is no `java` on the PATH; install a Java runtime (version 8 or later)"
        )
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False, cwd=folder)
    answers = done.stdout.decode(errors="replace").removesuffix("\n").split("\n")
    if done.returncode != 0 or len(answers) != len(lines):
        said = (done.stderr + done.stdout[-500:]).decode(errors="replace").strip()[-500:]  # Java may use either
        raise SubprocessError(
            f"the {name} failed: expected {len(lines)} lines of `java`, got {len(answers)} and exit "
            f"code {done.returncode}: {said}; check that `java` runs"
        )
    return answers
