"""Creates the Python environment of an engine's workers and the boot script that starts them."""

import shlex
import sys
import tempfile
from pathlib import Path

from clusters.packages import CACHE, fetch_boot, find_uv
from clusters.processes import run_command

__all__ = ["WORKER_PYTHON", "install_project", "write_boot_script"]

_ROOT = CACHE.parent
_ENVIRONMENT = CACHE / "worker"
WORKER_PYTHON = _ENVIRONMENT / "bin" / "python"

# RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT keeps Beam's boot program from creating another virtual environment.
_BOOT = """#!/bin/sh
export PATH={bin}:"$PATH" VIRTUAL_ENV={environment} RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
exec {boot} "$@" >> {logs}/worker-$$.log 2>&1
"""


def install_project() -> None:
    """Builds the project's wheel and installs it with the locked dependencies into the workers' environment."""
    with tempfile.TemporaryDirectory() as scratch:
        run_command([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", scratch], _ROOT)
        (wheel,) = Path(scratch).glob("*.whl")
        if not WORKER_PYTHON.exists():
            venv = [find_uv(), "venv", "--quiet", "--seed", "--allow-existing"]
            run_command([*venv, "--python", sys.executable, str(_ENVIRONMENT)])
        pip = [find_uv(), "pip", "install", "--quiet", "--python", str(WORKER_PYTHON)]
        lock = str(_ROOT / "requirements.lock")
        run_command([*pip, "--constraint", lock, "--reinstall-package", "captionlib", str(wheel)])


def write_boot_script(folder: Path) -> Path:
    """Writes the script with which an engine starts workers. Workers log to `folder/logs`."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    text = _BOOT.format(
        bin=shlex.quote(str(_ENVIRONMENT / "bin")),
        environment=shlex.quote(str(_ENVIRONMENT)),
        boot=shlex.quote(str(fetch_boot())),
        logs=shlex.quote(str(logs)),
    )
    path = folder / "boot"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path
