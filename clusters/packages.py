"""Downloads engines, Beam runners and Beam's boot program from package registries, by name and exact version.

Each package is downloaded once into a cache folder. A package in the cache is always complete.
"""

import os
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
    """The jars of an engine, from its source package on PyPI.

    Attributes:
        name: name of the package.
        version: version of the package and of the engine.
        jars: folder in the package that contains the jars.
    """

    name: str
    version: str
    jars: str

    def fetch(self) -> Path:
        """Returns the folder of the jars; downloads them if necessary."""
        return _fetch_once(f"{self.name}-{self.version}", self._download)

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
                        assert content is not None, "a jar is a regular file"
                        with (folder / path.name).open("wb") as file:
                            shutil.copyfileobj(content, file)


@dataclass(frozen=True)
class RunnerPackage:
    """Beam's runner for an engine, with its dependencies, from Maven.

    Attributes:
        artifact: artifact name of the runner.
        version: latest version with a published job service. Newer Python SDKs are compatible with it.
    """

    artifact: str
    version: str = "2.62.0"

    def fetch(self) -> Path:
        """Returns the folder of the jars; downloads them if necessary."""
        return _fetch_once(f"{self.artifact}-{self.version}", self._download)

    def _download(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            pom = Path(scratch) / "pom.xml"
            pom.write_text(_POM.format(artifact=self.artifact, version=self.version), encoding="utf-8")
            goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={folder}"]
            run_command([_find_program("mvn", "Maven"), "--quiet", "--batch-mode", "--file", str(pom), *goal])


FLINK = EnginePackage("apache-flink-libraries", "1.19.3", "deps/lib")
FLINK_RUNNER = RunnerPackage("beam-runners-flink-1.19")
SPARK = EnginePackage("pyspark", "3.5.9", "deps/jars")
SPARK_RUNNER = RunnerPackage("beam-runners-spark-3")


def fetch_boot() -> Path:
    """Returns the path of Beam's program that starts Python workers, in the version of the installed SDK."""
    return _fetch_go_program("github.com/apache/beam/sdks/v2/python/container")


def fetch_prism() -> Path:
    """Returns the path of Prism, Beam's single-process engine, in the version of the installed SDK."""
    return _fetch_go_program("github.com/apache/beam/sdks/v2/go/cmd/prism")


def find_uv() -> str:
    """Returns the path of the uv that the Makefile uses."""
    path = shutil.which("uv", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{CACHE.parent / '.uv' / 'bin'}")
    if path is None:
        raise ClusterError("uv was not found: expected uv on PATH or in .uv/bin; run `make setup`")
    return path


def _fetch_go_program(module: str) -> Path:
    name, beam = module.rsplit("/", 1)[-1], version("apache-beam")

    def install(folder: Path) -> None:
        run_command([_find_program("go", "Go"), "install", f"{module}@v{beam}"], GOBIN=str(folder))

    return _fetch_once(f"{name}-{beam}", install) / name


def _fetch_once(name: str, fetch: Callable[[Path], None]) -> Path:
    target = CACHE / name
    if not target.exists():
        CACHE.mkdir(exist_ok=True)
        print(f"downloading {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            partial = Path(scratch) / name
            partial.mkdir()
            fetch(partial)
            partial.rename(target)
    return target


def _find_program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ClusterError(f"{name} was not found: expected {package} on PATH; install {package}")
    return path
