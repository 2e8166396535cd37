"""Measures peak memory of driver and workers for 10,000,000 synthetic rows in 10,000 shards, relative to a tenth."""

import resource
import tempfile
import time
from functools import partial

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from benchmarks.bars import measure_seconds, read_peak_megabytes, report, run_benchmark, run_in_new_process
from benchmarks.synthetic_shards import create_job, write_rows
from pipelines.process_shards import ProcessShards
from pipelines.run import RunConfig, run_job

SHARDS, ROWS, WORKERS = 10_000, 1000, 2


def process(shards: int) -> list[float]:
    """Processes shards. Returns the peak memory of the driver and of the largest worker, in megabytes."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        source = write_rows(f"{scratch}/manifest", shards, ROWS)
        print(f"# {shards:,} shards of {ROWS:,} rows: manifest written in {time.perf_counter() - began:.1f} s")
        job = create_job(source, f"{scratch}/features")
        seconds = measure_seconds(partial(run_job, job, "scale", RunConfig(workers=WORKERS)))
        milliseconds = 1000 * seconds * WORKERS / shards
        print(f"# run: {seconds:.1f} s with {WORKERS} workers, {milliseconds:.1f} ms of worker time per shard")
        for verb, read in (("list", job.outputs[0].list_written_shards), ("read", job.outputs[0].compute_totals)):
            print(f"# time to {verb} the markers: {measure_seconds(read):.2f} s")
        pipeline = beam.Pipeline(FnApiRunner(), PipelineOptions([]))
        _ = pipeline | "scale" >> ProcessShards(job, range(shards), 1.0)
        print(f"# job graph: {pipeline.to_runner_api().ByteSize() / 1000:.0f} kB")
    driver, worker = read_peak_megabytes(), read_peak_megabytes(resource.RUSAGE_CHILDREN)
    print(f"# peak memory: driver {driver:.0f} MB, worker {worker:.0f} MB", flush=True)
    return [driver, worker]


def main() -> None:
    driver_few, worker_few = run_in_new_process(process, SHARDS // 10)
    driver_many, worker_many = run_in_new_process(process, SHARDS)
    report("scale-driver-memory", driver_many / driver_few, 1.5, at_least=False)
    report("scale-worker-memory", worker_many / worker_few, 1.2, at_least=False)


if __name__ == "__main__":
    run_benchmark(main)
