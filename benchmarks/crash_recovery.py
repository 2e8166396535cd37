"""Kills runs at random moments and resumes them; the output must be identical to that of an uninterrupted run."""

import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.bars import report, run_benchmark
from benchmarks.synthetic_images import write_images, write_manifest
from captionlib.data.images.loading import LoadingConfig
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.captioning import GenerationConfig
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from pipelines.extract_features import extract_features
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig

RUNS = 30
EXTRACTION = ExtractionConfig(
    EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean"), LoadingConfig(), batch_size=5
)
GENERATION = GenerationConfig(DecodingConfig(beam_width=3, n_best=2), batch_size=7)


def run_flow(folder: Path, output: Path, run: RunConfig = RunConfig(progress=False)) -> None:
    """Extracts features of the folder's manifest and captions them, into `output`."""
    extract_features(folder / "manifest", output / "features", EXTRACTION, device="cpu", run=run)
    generate_captions(output / "features", folder / "captioner", output / "captions", GENERATION, device="cpu", run=run)


def train_small_captioner(folder: Path) -> None:
    """Trains a captioner on the folder's manifest, whose captions are all the same."""
    extract_features(folder / "manifest", folder / "first", EXTRACTION, device="cpu", run=RunConfig(progress=False))
    config = CaptionerTrainingConfig(
        training=TrainingConfig(epochs=1), validation_splits=("train",), min_count=1, batch_images=8
    )
    train_captioner(folder / "first", folder / "captioner", config, device="cpu", progress=False)


def count_identical_recoveries(folder: Path, runs: int, seed: int = 0) -> int:
    """Kills and resumes `runs` flows; returns how many wrote the same bytes as an uninterrupted flow."""
    uris = [str(path) for path in write_images(folder / "images", 48, size=96)]
    manifest = write_manifest(folder / "manifest", uris, 6)
    train_small_captioner(folder)
    context = multiprocessing.get_context("forkserver")  # imports the modules once
    context.set_forkserver_preload([__name__])
    start_flow(context, folder, folder / "uninterrupted").join()
    expected = read_outputs(folder / "uninterrupted")
    shards = 2 * manifest.shards
    assert len(expected) == shards, "the uninterrupted run must be complete"
    times = sorted(marker.stat().st_mtime for marker in find_markers(folder / "uninterrupted"))
    seconds = (times[-1] - times[0]) / (shards - 1)

    generator = random.Random(seed)
    identical = 0
    for number in range(runs):
        output = folder / f"killed{number}"
        kill_flow(start_flow(context, folder, output), output, generator.uniform(0, shards), seconds)
        while is_complete(output):  # it finished before it was killed, so it does not count
            shutil.rmtree(output)
            kill_flow(start_flow(context, folder, output), output, generator.uniform(0, shards), seconds)
        finished = len(find_markers(output))
        start_flow(context, folder, output).join()
        same = read_outputs(output) == expected and is_complete(output)
        outcome = "identical" if same else "DIFFERENT"
        print(f"# killed with {finished:2} of {shards} shards finished: {outcome}", flush=True)
        identical += same
    return identical


def kill_flow(process: BaseProcess, output: Path, moment: float, seconds: float) -> None:
    """Kills a flow after `moment` shards, so 2.5 is about the middle of the third. A shard takes `seconds`."""
    while len(find_markers(output)) < int(moment) and process.is_alive():
        time.sleep(0.002)
    time.sleep(moment % 1 * seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the flow failed before it was killed, with exit code {process.exitcode}")


OUTPUTS = ("features", "captions")


def is_complete(output: Path) -> bool:
    return all((output / name / "_SUCCESS").exists() for name in OUTPUTS)


def find_markers(output: Path) -> list[Path]:
    return list(output.glob("*/__shards/*.json"))


def start_flow(context: multiprocessing.context.ForkServerContext, folder: Path, output: Path) -> BaseProcess:
    process = context.Process(target=run_flow, args=(folder, output))
    process.start()
    return process


def read_outputs(output: Path) -> dict[str, bytes]:
    return {f"{name}/{path.name}": path.read_bytes() for name in OUTPUTS for path in (output / name).glob("*.parquet")}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        identical = count_identical_recoveries(Path(scratch), RUNS)
    report("crash-recovery-identical", identical / RUNS, 1.0)


if __name__ == "__main__":
    run_benchmark(main)
