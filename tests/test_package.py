"""The wheel, installed into an environment of its own, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the `bin` folder of an environment with the wheel and, from this environment, its dependencies."""
    folder = tmp_path_factory.mktemp("package")
    source = _copy_docker_context(folder / "source")
    _run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)], source)
    (wheel,) = folder.glob("*.whl")
    _run([sys.executable, "-m", "venv", str(folder / "environment")], folder)
    python = folder / "environment" / "bin" / "python"
    _run([str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)], folder)
    # A folder named in a .pth file is searched, but its own .pth files, such as the checkout's, are not read.
    (packages,) = (folder / "environment").glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def _copy_docker_context(target: Path) -> Path:
    """Copies the files that the Dockerfile builds the wheel from: those that .dockerignore includes with `!`."""
    target.mkdir()
    for line in (CHECKOUT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source = CHECKOUT / line[1:]
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, target / source.name)
    return target


def _run(command: list[str], folder: Path, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_package_is_complete_outside_a_checkout(environment: Path, tmp_path: Path) -> None:
    where = _run([str(environment / "python"), "-c", "import captionlib; print(captionlib.__file__)"], tmp_path)
    assert Path(where).is_relative_to(environment.parent)
    assert (Path(where.strip()).parent / "py.typed").exists()
    recipes = _run([str(environment / "captionlib"), "recipes"], tmp_path)
    assert "talk-lstm" in recipes
    assert "flink" in recipes


def test_the_installed_package_runs_the_smallest_demo(environment: Path, tmp_path: Path) -> None:
    command = [str(environment / "python"), "-m", "captionlib", "demo", "--train-images", "20", "--test-images", "4"]
    printed = _run([*command, "--output", str(tmp_path / "demo"), "--no-progress"], tmp_path, OMP_NUM_THREADS="1")
    assert (tmp_path / "demo" / "report" / "index.html").exists()
    assert "CIDEr" in printed
