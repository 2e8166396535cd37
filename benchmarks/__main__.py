"""Runs all benchmarks, or only the named ones: `python -m benchmarks [NAME ...]`. Exits non-zero if a bar is missed."""

import subprocess
import sys

BENCHMARKS = (
    *("extract-throughput", "encoder-bfloat16", "extract-memory", "prepare-memory", "manifest-update"),
    *("decode-jpeg", "photo-throughput", "decoding-speed", "dense-beam-search", "nucleus-sampling"),
    *("command-help", "caption-photo", "neuraltalk-decoder", "transformers-captioner", "training-throughput"),
    *("packed-training", "training-data-wait", "training-memory", "corrupt-images", "crash-recovery"),
    *("killed-commands", "concurrent-commands", "histories", "collection-update", "storage-faults"),
    *("flipped-bits", "repeated-bundles", "shard-overhead", "resume", "scale", "live-updates", "search"),
    *("serve-home-page", "serve-scroll", "serve-clients", "serve-soak", "report-page", "flink-throughput"),
)


def main() -> None:
    """Runs each benchmark in a separate process, so that each measures its own peak memory."""
    names = sys.argv[1:] or BENCHMARKS
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"unknown benchmark {', '.join(unknown)}; available: {', '.join(BENCHMARKS)}")
    modules = {name: f"benchmarks.{name.replace('-', '_')}" for name in names}
    short = [name for name in names if subprocess.run([sys.executable, "-m", modules[name]], check=False).returncode]
    sys.exit(f"missed a bar or failed: {', '.join(short)}" if short else 0)


if __name__ == "__main__":
    main()
