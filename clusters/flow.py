"""The flow as a person types it, on a drawn data set: the same command lines on this machine and on a cluster."""

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

_QUESTIONS = ["red", "+ring -green", '"a white background"']

# A network that is light enough for a test.
_ENCODER = (
    *("encoder.model=squeezenet1_1", "encoder.node=features.7.cat", "encoder.pooling=mean"),
    *("encoder.weights=random:0", "batch_size=4"),
)


@dataclass(frozen=True)
class Flow:
    """A folder with a manifest of drawn scenes, a captioner and a ranker, and the outputs of any number of runs.

    Attributes:
        folder: where; commands run in it and name everything relative to it, as people do.
    """

    folder: Path

    def prepare(self, images: int, shard_size: int) -> None:
        """Draws the images, of which two are damaged, runs the flow on this machine and trains what it needs."""
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
        """Runs a stage to its end.

        Args:
            stage: one of `STAGES`.
            output: the run's folder.
            beam_options: what stands after `--`.
            workers: processes on this machine.

        Returns:
            What it printed.

        Raises:
            ClusterError: it failed.
        """
        return self._run([*self.command(stage, output), "--workers", str(workers), "--", *beam_options])

    def start(self, stage: str, output: str, beam_options: Sequence[str]) -> "subprocess.Popen[str]":
        """Starts a stage and does not wait; what it prints is read through pipes."""
        command = [*_CAPTIONLIB, *self.command(stage, output), "--", *beam_options]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def command(self, stage: str, output: str) -> list[str]:
        """What comes before the options that say where a stage runs."""
        if stage == "build-index":
            return [stage, f"{output}/captions", "-e", f"{output}/embeddings", "-o", f"{output}/index"]
        loading = ["--no-progress", "--device", "cpu", "--set", "loading.decode.processes=1"]
        if stage == "extract-features":
            encoder = [part for value in _ENCODER for part in ("--set", value)]
            return [stage, "manifest", "-o", f"{output}/features", *encoder, *loading]
        outputs = ["-o", f"{output}/captions", "--ranker", "ranker", "--embeddings", f"{output}/embeddings"]
        return [stage, "manifest", "-c", "captioner", *outputs, *loading]

    def count_done(self, stage: str, output: str) -> int:
        """The shards that a stage has published; of an index, the rows that it has written."""
        where = {"extract-features": f"features/{MARKERS_FOLDER}", "generate-captions": f"captions/{MARKERS_FOLDER}"}
        return len(list((self.folder / output / where.get(stage, "index/rows")).glob("part-*")))

    def is_complete(self, stage: str, output: str) -> bool:
        where = {"extract-features": "features/_SUCCESS", "generate-captions": "captions/_SUCCESS"}
        return (self.folder / output / where.get(stage, "index/index.json")).exists()

    def compare(self, stage: str, output: str) -> list[str]:
        """In what a run's output differs from that of the undisturbed run on this machine."""
        local, other = self.folder / "local", self.folder / output
        if stage == "build-index":
            return compare_indexes(local / "index", other / "index", _QUESTIONS)
        names = ["features"] if stage == "extract-features" else ["captions", "embeddings"]
        return [f"{name}: {one}" for name in names for one in compare_datasets(local / name, other / name)]

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
    """Every process computes with one thread, as the workers of a cluster with one slot a core do."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
