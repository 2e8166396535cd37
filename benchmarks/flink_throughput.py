"""Measures images/s of `extract-features` on Flink with two TaskManagers, relative to two local workers.

The time is measured from the start of the first shard to the end of the last, according to the markers (the files that
mark shards as complete). It excludes submitting the job and starting its workers, which do not depend on the size of
the job. The time of the whole command is printed too.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bars import report, run_benchmark
from benchmarks.synthetic_images import write_images, write_manifest
from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.data.shards.markers import MARKERS_FOLDER, part_name
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.extraction import ExtractionConfig
from clusters.flink import FlinkCluster
from pipelines.beam_options import to_flags
from pipelines.extract_features import extract_features
from pipelines.run import RunConfig

IMAGES, SHARD_SIZE, ROUNDS = 768, 16, 3
CONFIG = ExtractionConfig(
    EncoderConfig("resnet18", "flatten", "random:0"), LoadingConfig(decode=DecoderConfig(processes=1)), batch_size=16
)


def run(manifest: ShardedDataset, output: Path, workers: int = 1, beam_options: Sequence[str] = ()) -> float:
    began = time.monotonic()
    settings = RunConfig(workers, tuple(beam_options), progress=False)
    extract_features(manifest.folder.uri, output, CONFIG, device="cpu", run=settings)
    total = time.monotonic() - began
    seconds = measure_shards(output)
    print(f"# {output.name}: {IMAGES / seconds:.2f} images/s for {seconds:.0f} s; the whole command took {total:.0f} s")
    return IMAGES / seconds


def measure_shards(output: Path) -> float:
    """Returns the seconds from the start of the first shard to the end of the last."""
    markers = open_dataset(output).read_markers()
    ends = {shard: (output / MARKERS_FOLDER / f"{part_name(shard)}.json").stat().st_mtime for shard in markers}
    return max(ends.values()) - min(ends[shard] - marker.seconds for shard, marker in markers.items())


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = [str(path) for path in write_images(folder / "images", IMAGES)]
        manifest = write_manifest(folder / "manifest", images, SHARD_SIZE)
        cluster = FlinkCluster(folder / "cluster")
        try:
            cluster.start()
            flags = list(to_flags(cluster.beam_options, "flink"))
            ratios = [
                run(manifest, folder / f"flink{number}", beam_options=flags)
                / run(manifest, folder / f"local{number}", workers=2)
                for number in range(ROUNDS)
            ]
        finally:
            cluster.stop()
        report("flink-throughput", statistics.median(ratios), 0.8)


if __name__ == "__main__":
    run_benchmark(main)
