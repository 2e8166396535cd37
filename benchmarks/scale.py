"""Measures peak memory of driver and workers for 10,000,000 synthetic rows in 10,000 shards, relative to a tenth."""

import resource
import subprocess
import sys
import tempfile
import time

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from benchmarks.bars import report
from benchmarks.synthetic_shards import create_job, write_rows
from pipelines.process_shards import ProcessShards
from pipelines.run import RunConfig, run_job

SHARDS, ROWS, WORKERS = 10_000, 1000, 2


def run_once(shards: int) -> None:
    """Processes `shards` shards and prints the peak memory of the driver and of the largest worker, in kilobytes."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        source = write_rows(f"{scratch}/manifest", shards, ROWS)
        print(f"# {shards:,} shards of {ROWS:,} rows: manifest written in {time.perf_counter() - began:.1f} s")
        job = create_job(source, f"{scratch}/features")
        began = time.perf_counter()
        run_job(job, "scale", RunConfig(workers=WORKERS))
        seconds = time.perf_counter() - began
        milliseconds = 1000 * seconds * WORKERS / shards
        print(f"# run: {seconds:.1f} s with {WORKERS} workers, {milliseconds:.1f} ms of worker time per shard")
        for verb, read in (("list", job.outputs[0].list_written_shards), ("read", job.outputs[0].compute_totals)):
            began = time.perf_counter()
            read()
            print(f"# time to {verb} the markers: {time.perf_counter() - began:.2f} s")
        pipeline = beam.Pipeline(FnApiRunner(), PipelineOptions([]))
        _ = pipeline | "scale" >> ProcessShards(job, range(shards), 1.0)
        print(f"# job graph: {pipeline.to_runner_api().ByteSize() / 1000:.0f} kB")
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(*peaks)


def main() -> None:
    """Runs a tenth of the shards and all of them, in separate processes."""
    if len(sys.argv) == 2:
        run_once(int(sys.argv[1]))
        return
    peaks = []
    for shards in (SHARDS // 10, SHARDS):
        command = [sys.executable, "-m", "benchmarks.scale", str(shards)]
        *lines, last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        peaks.append([int(peak) for peak in last.split()])
        print(*lines, sep="\n")
        print("# peak memory: driver {:.0f} MB, worker {:.0f} MB".format(*(peak / 1024 for peak in peaks[-1])))
    (driver_few, worker_few), (driver_many, worker_many) = peaks
    met = [
        report("scale-driver-memory", driver_many / driver_few, 1.5, at_least=False),
        report("scale-worker-memory", worker_many / worker_few, 1.2, at_least=False),
    ]
    sys.exit(not all(met))


if __name__ == "__main__":
    main()
