"""Runs all benchmarks, or only the named ones: `python -m benchmarks [NAME ...]`. Exits non-zero if a bar is missed."""

import subprocess
import sys

BENCHMARKS = {
    "extract-throughput": "benchmarks.extract_throughput",
    "encoder-bfloat16": "benchmarks.encoder_bfloat16",
    "extract-memory": "benchmarks.extract_memory",
    "prepare-memory": "benchmarks.prepare_memory",
    "manifest-update": "benchmarks.manifest_update",
    "decode-jpeg": "benchmarks.decode_jpeg",
    "photo-throughput": "benchmarks.photo_throughput",
    "decoding-speed": "benchmarks.decoding_speed",
    "dense-beam-search": "benchmarks.dense_beam_search",
    "nucleus-sampling": "benchmarks.nucleus_sampling",
    "command-help": "benchmarks.command_help",
    "caption-photo": "benchmarks.caption_photo",
    "neuraltalk-decoder": "benchmarks.neuraltalk_decoder",
    "transformers-captioner": "benchmarks.transformers_captioner",
    "training-throughput": "benchmarks.training_throughput",
    "packed-training": "benchmarks.packed_training",
    "training-data-wait": "benchmarks.training_data_wait",
    "training-memory": "benchmarks.training_memory",
    "corrupt-images": "benchmarks.corrupt_images",
    "crash-recovery": "benchmarks.crash_recovery",
    "killed-commands": "benchmarks.killed_commands",
    "histories": "benchmarks.histories",
    "collection-update": "benchmarks.collection_update",
    "storage-faults": "benchmarks.storage_faults",
    "flipped-bits": "benchmarks.flipped_bits",
    "repeated-bundles": "benchmarks.repeated_bundles",
    "shard-overhead": "benchmarks.shard_overhead",
    "resume": "benchmarks.resume",
    "scale": "benchmarks.scale",
    "live-updates": "benchmarks.live_updates",
    "search": "benchmarks.search",
    "serve-home-page": "benchmarks.serve_home_page",
    "serve-scroll": "benchmarks.serve_scroll",
    "serve-clients": "benchmarks.serve_clients",
    "serve-soak": "benchmarks.serve_soak",
    "report-page": "benchmarks.report_page",
    "flink-throughput": "benchmarks.flink_throughput",
}


def main() -> None:
    """Runs each benchmark in a separate process, so that each measures its own peak memory."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"unknown benchmark {', '.join(unknown)}; available: {', '.join(BENCHMARKS)}")
    short = [name for name in names if subprocess.run([sys.executable, "-m", BENCHMARKS[name]], check=False).returncode]
    sys.exit(f"missed a bar or failed: {', '.join(short)}" if short else 0)


if __name__ == "__main__":
    main()
