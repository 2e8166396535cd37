"""Runs pipelines in which Beam executes every bundle twice; the output must be identical, byte for byte."""

import tempfile
from pathlib import Path

from benchmarks.bars import report, run_benchmark
from benchmarks.crash_recovery import read_outputs, run_flow, train_small_captioner
from benchmarks.synthetic_images import write_images, write_manifest
from pipelines.run import RunConfig


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_manifest(folder / "manifest", [str(path) for path in write_images(folder / "images", 24, size=96)], 6)
        train_small_captioner(folder)
        outputs = []
        for name, options in (("once", ()), ("twice", ("--direct_runner_bundle_repeat=1",))):
            run_flow(folder, folder / name, RunConfig(beam_options=options, progress=False))
            outputs.append(read_outputs(folder / name))
        once, twice = outputs
        identical = sum(once[name] == twice.get(name) for name in once)
    report("repeated-bundles-identical", identical / len(once), 1.0)


if __name__ == "__main__":
    run_benchmark(main)
