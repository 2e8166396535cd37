"""Runs the same captionlib commands on synthetic scenes, locally or on a cluster."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from captionlib.data.shards.markers import MARKERS_FOLDER
from captionlib.data.synthetic_scenes import write_scenes
from clusters.comparison import compare_datasets, compare_indexes
from clusters.processes import ClusterError

__all__ = ["STAGES", "Flow"]

STAGES = ("extract-features", "generate-captions", "build-index")

_QUERIES = ["red", "+ring -green", '"a white background"']

# A small network keeps the tests fast.
_ENCODER = (
    *("encoder.model=squeezenet1_1", "encoder.node=features.7.cat", "encoder.pooling=mean"),
    *("encoder.weights=random:0", "batch_size=4"),
)


@dataclass(frozen=True)
class Flow:
    """A folder with a manifest of synthetic scenes, a captioner, a ranker and the outputs of runs.

    Attributes:
        folder: path of the folder. Commands run in it and use relative paths.
    """

    folder: Path

    def prepare(self, images: int, shard_size: int) -> None:
        """Renders images, truncates two of them, trains the models and runs all stages on this machine."""
        write_scenes(self.folder, train=images - images // 8, val=images // 16, test=images // 16)
        for path in sorted((self.folder / "images").iterdir())[3::7][:2]:
            path.write_bytes(path.read_bytes()[:200])
        prepare = ["prepare", "dataset.json", "-o", "manifest", "--shard-size", str(shard_size)]
        train = ["--set", "training.epochs=2", "--set", "batch_images=32", "--device", "cpu", "--no-progress"]
        small = ["--set", "captioner.hidden_size=64", "--set", "captioner.embedding_size=64"]
        joint = ["--set", "ranker.joint_embedding_size=64", "--set", "ranker.hidden_size=64"]
        self._run(prepare)
        self.run("extract-features", "local", workers=2)
        self._run(["train-captioner", "local/features", "-o", "captioner", *small, *train])
        self._run(["train-ranker", "local/features", "-o", "ranker", *joint, *train])
        self.run("generate-captions", "local", workers=2)
        self.run("build-index", "local", workers=2)

    def run(self, stage: str, output: str, beam_options: Sequence[str] = (), workers: int = 1) -> str:
        """Runs a stage and waits for it.

        Args:
            stage: one of `STAGES`.
            output: folder of the run, relative to the flow's folder.
            beam_options: Beam options after `--`.
            workers: worker processes on this machine.

        Returns:
            The output of the command.

        Raises:
            ClusterError: the command failed.
        """
        return self._run([*self._build_command(stage, output), "--workers", str(workers), "--", *beam_options])

    def start(self, stage: str, output: str, beam_options: Sequence[str]) -> "subprocess.Popen[str]":
        """Starts a stage without waiting for it; its output goes to a pipe."""
        command = [*_CAPTIONLIB, *self._build_command(stage, output), "--", *beam_options]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _build_command(self, stage: str, output: str) -> list[str]:
        """Returns the command without the options that determine where it runs."""
        if stage == "build-index":
            return [stage, f"{output}/captions", "-e", f"{output}/embeddings", "-o", f"{output}/index"]
        loading = ["--no-progress", "--device", "cpu", "--set", "loading.decode.processes=1"]
        if stage == "extract-features":
            encoder = [part for value in _ENCODER for part in ("--set", value)]
            return [stage, "manifest", "-o", f"{output}/features", *encoder, *loading]
        outputs = ["-o", f"{output}/captions", "--ranker", "ranker", "--embeddings", f"{output}/embeddings"]
        return [stage, "manifest", "-c", "captioner", *outputs, *loading]

    def count_finished_shards(self, stage: str, output: str) -> int:
        """Returns the number of shards that a stage has published; for `build-index`, the number of files of rows."""
        folders = {"extract-features": f"features/{MARKERS_FOLDER}", "generate-captions": f"captions/{MARKERS_FOLDER}"}
        return len(list((self.folder / output / folders.get(stage, "index/rows")).glob("part-*")))

    def is_complete(self, stage: str, output: str) -> bool:
        """Returns whether the output of a stage is complete."""
        files = {"extract-features": "features/_SUCCESS", "generate-captions": "captions/_SUCCESS"}
        return (self.folder / output / files.get(stage, "index/index.json")).exists()

    def compare(self, stage: str, output: str) -> list[str]:
        """Returns the differences between the output of a run and the output of the uninterrupted local run."""
        local, other = self.folder / "local", self.folder / output
        if stage == "build-index":
            return compare_indexes(local / "index", other / "index", _QUERIES)
        names = ["features"] if stage == "extract-features" else ["captions", "embeddings"]
        return [
            f"{name}: {difference}" for name in names for difference in compare_datasets(local / name, other / name)
        ]

    def _run(self, command: list[str]) -> str:
        result = subprocess.run(
            [*_CAPTIONLIB, *command],
            cwd=self.folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if result.returncode:
            raise ClusterError(f"captionlib {' '.join(command)}: exit status {result.returncode}\n{result.stdout}")
        return result.stdout


_CAPTIONLIB = [str(Path(sys.executable).parent / "captionlib")]


def _environment() -> dict[str, str]:
    """Returns an environment that limits every process to one thread, like cluster workers with one slot per core."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
