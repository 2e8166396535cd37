"""Runs pipelines in which Beam executes every bundle twice; the output must be identical, byte for byte."""

import sys
import tempfile
from pathlib import Path

from benchmarks.bars import report
from benchmarks.crash_recovery import EXTRACTION, GENERATION, read_outputs, train_small_captioner
from benchmarks.synthetic_images import write_images, write_manifest
from pipelines.extract_features import extract_features
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig


def main() -> None:
    """Runs the flow with and without repeated bundles, and reports the fraction of identical files."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_manifest(folder / "manifest", [str(path) for path in write_images(folder / "images", 24, size=96)], 6)
        train_small_captioner(folder)
        outputs = []
        for name, options in (("once", ()), ("twice", ("--direct_runner_bundle_repeat=1",))):
            run = RunConfig(beam_options=options, progress=False)
            output = folder / name
            extract_features(folder / "manifest", output / "features", EXTRACTION, run=run)
            generate_captions(output / "features", folder / "captioner", output / "captions", GENERATION, run=run)
            outputs.append(read_outputs(output))
        once, twice = outputs
        identical = sum(once[name] == twice.get(name) for name in once)
    sys.exit(not report("repeated-bundles-identical", identical / len(once), 1.0))


if __name__ == "__main__":
    main()
