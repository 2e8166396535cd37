"""Fetches engines, Beam's runners and its boot program from the package registries, by name and exact version, once.

Everything goes into a cache folder, where it appears whole or not at all.
"""

import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from clusters.processes import ClusterError, run_command

__all__ = ["CACHE", "FLINK", "FLINK_RUNNER", "SPARK", "SPARK_RUNNER", "fetch_boot", "fetch_prism", "find_uv"]

CACHE = Path(__file__).resolve().parents[1] / ".cluster"

_POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>captionlib</groupId><artifactId>clusters</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>org.apache.beam</groupId><artifactId>{artifact}</artifactId><version>{version}</version>
  </dependency></dependencies>
</project>
"""


@dataclass(frozen=True)
class EnginePackage:
    """The jars of an engine, as its source package on PyPI carries them.

    Attributes:
        name: of the package.
        version: of the package, which is the engine's.
        jars: the folder of the package that they lie in.
    """

    name: str
    version: str
    jars: str

    def fetch(self) -> Path:
        """A folder with the jars."""
        return _cached(f"{self.name}-{self.version}", self._download)

    def _download(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            pip = [find_uv(), "tool", "run", "--quiet", "pip", "download", "--quiet", "--no-deps"]
            run_command([*pip, "--no-binary", ":all:", "--dest", scratch, f"{self.name}=={self.version}"])
            (archive,) = Path(scratch).iterdir()
            with tarfile.open(archive) as package:
                for member in package:
                    path = Path(member.name)
                    if path.suffix == ".jar" and str(path.parent).endswith(f"/{self.jars}"):
                        content = package.extractfile(member)
                        assert content is not None, "a jar is a file"
                        with (folder / path.name).open("wb") as file:
                            shutil.copyfileobj(content, file)


@dataclass(frozen=True)
class RunnerPackage:
    """Beam's runner for an engine, with what it depends on, from Maven.

    Attributes:
        artifact: its name.
        version: the newest that is to be had with its job service; newer Python SDKs talk to it all the same.
    """

    artifact: str
    version: str = "2.62.0"

    def fetch(self) -> Path:
        """A folder with the jars."""
        return _cached(f"{self.artifact}-{self.version}", self._download)

    def _download(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            pom = Path(scratch) / "pom.xml"
            pom.write_text(_POM.format(artifact=self.artifact, version=self.version), encoding="utf-8")
            goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={folder}"]
            run_command([_program("mvn", "Maven"), "--quiet", "--batch-mode", "--file", str(pom), *goal])


FLINK = EnginePackage("apache-flink-libraries", "1.19.3", "deps/lib")
FLINK_RUNNER = RunnerPackage("beam-runners-flink-1.19")
SPARK = EnginePackage("pyspark", "3.5.9", "deps/jars")
SPARK_RUNNER = RunnerPackage("beam-runners-spark-3")


def fetch_boot() -> Path:
    """Beam's program that starts a Python worker, of the same version as the SDK."""
    return _fetch_go_program("github.com/apache/beam/sdks/v2/python/container")


def fetch_prism() -> Path:
    """Beam's own engine of one process."""
    return _fetch_go_program("github.com/apache/beam/sdks/v2/go/cmd/prism")


def find_uv() -> str:
    """The uv that the Makefile uses."""
    return shutil.which("uv") or str(CACHE.parent / ".uv" / "bin" / "uv")


def _fetch_go_program(module: str) -> Path:
    name, beam = module.rsplit("/", 1)[-1], version("apache-beam")

    def install(folder: Path) -> None:
        run_command([_program("go", "Go"), "install", f"{module}@v{beam}"], GOBIN=str(folder))

    return _cached(f"{name}-{beam}", install) / name


def _cached(name: str, fetch: Callable[[Path], None]) -> Path:
    target = CACHE / name
    if not target.exists():
        CACHE.mkdir(exist_ok=True)
        print(f"fetching {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            partial = Path(scratch) / name
            partial.mkdir()
            fetch(partial)
            partial.rename(target)
    return target


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ClusterError(
            f"{name} was not found: expected {package} on PATH; install it, it fetches from its registry"
        )
    return found
