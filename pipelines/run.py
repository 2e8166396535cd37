"""Runs pipelines on the runner that Beam's options select, and waits for them."""

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

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
from pydantic import Field, PositiveInt

from captionlib.config import configclass
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


@configclass
class RunConfig:
    """How a pipeline runs.

    Attributes:
        workers: number of worker processes on this machine; a single one runs in the submitting process.
        beam_options: flags for Beam, such as `--runner=FlinkRunner`; `@FILE` is replaced by the options in a YAML file.
        max_failure_ratio: largest ratio of failed images; above it the run fails, after all shards are written.
        retry_failures: process the failed images of finished shards again.
        overwrite: replace the output of another configuration.
        progress: show a progress bar.
        accelerator: Beam's resource hint for a GPU in each worker. Models then run on that GPU only.
    """

    workers: PositiveInt = 1
    beam_options: tuple[str, ...] = ()
    max_failure_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    retry_failures: bool = False
    overwrite: bool = False
    progress: bool = True
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.accelerator is not None and not self.accelerator.startswith("type:"):
            raise ConfigError(
                "accelerator: expected a hint such as type:nvidia-l4;count:1;install-nvidia-driver, "
                f"got {self.accelerator!r}"
            )

    @property
    def threads_per_worker(self) -> int | None:
        """The number of computing threads of each local worker; None for a single one, which uses the defaults."""
        return max(1, available_cpus() // self.workers) if self.workers > 1 else None

    def resolve_devices(self, device: str) -> tuple[str, str]:
        """Returns the devices of the submitting process, which only reads the models' properties, and of the workers.

        With an accelerator, `auto` means a GPU on the workers, so that a worker without one fails.
        """
        if self.accelerator is None:
            return device, device
        return "auto", "cuda" if device == "auto" else device

    def divide_decoders(self, loading: LoadingConfig) -> LoadingConfig:
        """Divides the decoder processes of this machine among its workers, unless their number is configured."""
        if self.threads_per_worker is None or loading.decode.processes is not None:
            return loading
        return replace(loading, decode=replace(loading.decode, processes=self.threads_per_worker))


def run_job(job: ShardJob, label: str, run: RunConfig) -> Totals:
    """Processes the pending shards of a job, shows progress and marks the outputs as complete.

    Returns:
        The totals of the first output. With Beam's `--dry_run`, those from before the run.

    Raises:
        FailureRatioError: more images failed than the run allows; all shards are written nevertheless.
    """
    _, options = choose_runner(run)  # checks the options before anything is changed
    if pending := job.pending_shards():
        job.mark_incomplete()
        with show_progress(job.source, job.outputs[0], label, run.progress):
            run_pipeline(ProcessShards(job, pending, run.max_failure_ratio, run.accelerator), label, run)
        if options.view_as(TestOptions).dry_run:
            return job.outputs[0].compute_totals()
    return job.finish(run.max_failure_ratio)


def run_pipeline(transform: beam.PTransform[PBegin, Any], label: str, run: RunConfig) -> None:
    """Runs a transform and waits for it. Ctrl-C cancels the job, also on a cluster.

    Raises:
        RunnerError: the runner failed or cannot be reached.
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
            f"{type(runner).__name__} did not finish {label}: {str(error) or type(error).__name__}; see the runner's "
            "logs. Run the same command again: finished shards are kept"
        ) from error


def choose_runner(run: RunConfig) -> tuple[PipelineRunner, PipelineOptions]:
    """Creates the runner that Beam's options select.

    The default, and the choice for DirectRunner, is the in-process FnApiRunner, because DirectRunner first tries to
    download a runner written in another language.

    Raises:
        ConfigError: the options do not fit the runner, or a file of options cannot be read.
    """
    flags = expand_option_files(run.beam_options)
    options = PipelineOptions(flags)
    name = options.view_as(StandardOptions).runner
    if name not in _IN_PROCESS:
        if run.workers > 1:
            raise ConfigError(
                f"--workers {run.workers} applies to this machine; {name} has its own option, such as --parallelism"
            )
        if run.accelerator is not None:
            _limit_to_one_process(options)
        return create_runner(name), options
    if run.accelerator is not None:
        raise ConfigError("--accelerator applies to workers of a cluster; use --device cuda for a GPU of this machine")
    _reject_unknown_flags(flags)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    if run.workers == 1:
        return FnApiRunner(), options
    options.view_as(DirectOptions).direct_num_workers = run.workers
    command = f"{shlex.quote(sys.executable)} -m pipelines.local_worker"
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command)), options


def _limit_to_one_process(options: PipelineOptions) -> None:
    """Runs one process per worker, because several would each load the models onto the same GPU."""
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    if any(option.startswith("worker_accelerator") for option in services):
        raise ConfigError("--accelerator conflicts with Dataflow's option worker_accelerator; remove one of them")
    options.view_as(DebugOptions).add_experiment("no_use_multiple_sdk_containers")


def _reject_unknown_flags(flags: Sequence[str]) -> None:
    """Rejects flags that Beam does not know. Other runners may have options that are unknown here."""
    known = PipelineOptions([]).get_all_options().keys()
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0].removeprefix("no_").replace("-", "_")
        if flag.startswith("--") and name not in known:
            raise ConfigError(
                f"{flag} is not an option of Beam's in-process runner; see Beam's list of pipeline options"
            )
