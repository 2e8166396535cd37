"""Runs a job of shards on whatever runner Beam's options name, and waits for it."""

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
    TestOptions,
)
from apache_beam.pvalue import PBegin
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner, create_runner
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from captionlib.cpus import available_cpus
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.progress import show_progress
from captionlib.data.shards.stages import ShardJob
from captionlib.errors import ConfigError, RunnerError
from pipelines.beam_options import expand_option_files
from pipelines.process_shards import ProcessShards

__all__ = ["RunConfig", "run_job", "run_pipeline"]

_IN_PROCESS = {None, "DirectRunner", "FnApiRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner"}


@dataclass(frozen=True)
class RunConfig:
    """How a pipeline is run.

    Attributes:
        workers: processes on this machine; one runs in the command's own process.
        beam_options: Beam's own options, such as `--runner=FlinkRunner`, untouched; `@FILE` stands for those in a YAML.
        max_failure_ratio: of the images; above it the run fails, after all shards are written.
        retry_failures: do the failed images of done shards again.
        overwrite: replace the output of another configuration.
        progress: show a progress bar.
        accelerator: of each worker, as Beam's hint of that name spells it; the models run there and nowhere else.
    """

    workers: int = 1
    beam_options: tuple[str, ...] = ()
    max_failure_ratio: float = 0.05
    retry_failures: bool = False
    overwrite: bool = False
    progress: bool = True
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers: expected at least 1, got {self.workers}")
        if not 0 <= self.max_failure_ratio <= 1:
            raise ConfigError(f"max_failure_ratio: expected 0 to 1, got {self.max_failure_ratio}")
        if self.accelerator is not None and not self.accelerator.startswith("type:"):
            raise ConfigError(
                f"accelerator: expected such as type:nvidia-l4;count:1;install-nvidia-driver, got {self.accelerator!r}"
            )

    @property
    def threads_per_worker(self) -> int:
        """How many threads each of the local workers computes with."""
        return max(1, available_cpus() // self.workers)

    def resolve_devices(self, device: str) -> tuple[str, str]:
        """Where models run here, where they are only looked at, and on the workers, where a GPU is had or refused."""
        if self.accelerator is None:
            return device, device
        return "auto", "cuda" if device == "auto" else device

    def divide_decoders(self, loading: LoadingConfig) -> LoadingConfig:
        """Splits the machine's decoder processes among its workers, unless their number is given."""
        if self.workers == 1 or loading.decode.processes is not None:
            return loading
        return replace(loading, decode=replace(loading.decode, processes=self.threads_per_worker))


def run_job(job: ShardJob, label: str, run: RunConfig) -> Totals:
    """Does what is pending of a job, shows its progress and marks the outputs complete.

    Raises:
        ConfigError: Beam does not know an option.
        FailureRatioError: more images failed than the run allows; everything is written all the same.

    Returns:
        What is done; with Beam's `--dry_run` that is what was done before.
    """
    _, options = choose_runner(run)  # what is wrong with them is said before anything is touched
    if pending := job.pending_shards():
        job.mark_incomplete()
        with show_progress(job.source, job.outputs[0], label, run.progress):
            run_pipeline(ProcessShards(job, pending, run.max_failure_ratio, run.accelerator), label, run)
        if options.view_as(TestOptions).dry_run:
            return job.outputs[0].compute_totals()
    return job.finish(run.max_failure_ratio)


def run_pipeline(transform: beam.PTransform[PBegin, Any], label: str, run: RunConfig) -> None:
    """Runs a transform to its end; a person's Ctrl-C ends it wherever it runs.

    Raises:
        ConfigError: see `choose_runner`.
        RunnerError: a runner elsewhere gave it up or cannot be reached.
    """
    runner, options = choose_runner(run)
    pipeline = beam.Pipeline(runner, options)
    _ = pipeline | label >> transform
    if isinstance(runner, FnApiRunner):
        pipeline.run().wait_until_finish()
        return
    try:
        result = pipeline.run()
        try:
            result.wait_until_finish()
        except KeyboardInterrupt:
            result.cancel()
            raise
    except (RuntimeError, grpc.RpcError, grpc.FutureTimeoutError) as error:
        raise RunnerError(
            f"{type(runner).__name__} did not finish {label}: {str(error) or type(error).__name__}; the engine's own "
            "logs say more. Run the same command again: shards that are done are kept"
        ) from error


def choose_runner(run: RunConfig) -> tuple[PipelineRunner, PipelineOptions]:
    """The runner that Beam's options name; without one, or with DirectRunner, the in-process runner.

    DirectRunner itself is passed over: it first tries to download a runner of another language.

    Raises:
        ConfigError: the in-process runner has no such option, a file of options cannot be read, or `workers` is given
            to another runner.
    """
    flags = expand_option_files(run.beam_options)
    options = PipelineOptions(flags)
    name = options.view_as(StandardOptions).runner
    if name not in _IN_PROCESS:
        if run.workers > 1:
            raise ConfigError(
                f"--workers {run.workers} is for this machine; {name} takes an option of its own, such as --parallelism"
            )
        if run.accelerator is not None:
            _ask_for_accelerators(options)
        return create_runner(name), options
    if run.accelerator is not None:
        raise ConfigError("--accelerator is for workers elsewhere; take --device cuda for a GPU of this machine")
    _refuse_unknown(flags)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    if run.workers == 1:
        return FnApiRunner(), options
    options.view_as(DirectOptions).direct_num_workers = run.workers
    command = f"{shlex.quote(sys.executable)} -m pipelines.local_worker"
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command)), options


def _ask_for_accelerators(options: PipelineOptions) -> None:
    """One process a worker, since several would each load the models into the same accelerator."""
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    if any(option.startswith("worker_accelerator") for option in services):
        raise ConfigError("--accelerator and Dataflow's option worker_accelerator exclude each other; leave one out")
    options.view_as(DebugOptions).add_experiment("no_use_multiple_sdk_containers")


def _refuse_unknown(flags: Sequence[str]) -> None:
    """A runner elsewhere has options that are not known here, the in-process runner has none."""
    known = PipelineOptions([]).get_all_options().keys()
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0].removeprefix("no_").replace("-", "_")
        if flag.startswith("--") and name not in known:
            raise ConfigError(f"{flag} is no option of Beam's in-process runner; see Beam's list of pipeline options")
