"""Runs pipelines on the runner that Beam's options select, and waits until they finish."""

import logging
import re
import shlex
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, cast
from urllib.error import URLError

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

from captionlib import errors
from captionlib.config import configclass
from captionlib.data.images.decoder_pool import available_cpus
from captionlib.data.images.loading import LoadingConfig
from captionlib.data.shards.markers import Totals
from captionlib.data.shards.progress import show_progress
from captionlib.data.shards.stages import ShardJob
from captionlib.errors import CaptionlibError, ConfigError, RunnerError
from pipelines.beam_options import expand_option_files
from pipelines.process_shards import ProcessShards

__all__ = ["RunConfig", "choose_runner", "run_job", "run_pipeline"]

_BEAM_COPY_ATTRIBUTE = "_tagged_with_step"  # Beam adds it to its copies of errors
_RAISED_ERROR = re.compile(r"captionlib\.errors\.(\w+): (.*?)(?: \[while running [^\n]*)?$", re.MULTILINE)
_STEP = re.compile(r" \[while running .*")
_TRACEBACK = "Traceback (most recent call last)"

_RUN_FILE = Path(tempfile.gettempdir()) / f"captionlib-run-{uuid.uuid4().hex}"  # local workers exit when it is deleted
_IN_PROCESS_RUNNERS = {None, "DirectRunner", "FnApiRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner"}


@configclass
class RunConfig:
    """Settings for running a pipeline.

    Attributes:
        workers: number of worker processes on this machine. If 1, the pipeline runs in the submitting process.
        beam_options: flags for Beam, such as `--runner=FlinkRunner`. `@FILE` reads flags from a YAML file.
        max_failure_ratio: largest allowed fraction of failed images. It is checked after all shards are written. If
            None, the run fails only if all images failed.
        retry_failures: process the failed images of finished shards (dataset files) again.
        verify: verify the checksums of finished shards, and process damaged ones again.
        overwrite: replace an output that was written with a different configuration.
        progress: show a progress bar.
        accelerator: Beam's resource hint for a GPU in each worker. If set, models run on that GPU only.
    """

    workers: PositiveInt = 1
    beam_options: tuple[str, ...] = ()
    max_failure_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    retry_failures: bool = False
    verify: bool = False
    overwrite: bool = False
    progress: bool = True
    accelerator: str | None = None

    def __post_init__(self) -> None:
        if self.accelerator is not None and not self.accelerator.startswith("type:"):
            raise ConfigError(
                "accelerator: expected a resource hint such as type:nvidia-l4;count:1;install-nvidia-driver, "
                f"got {self.accelerator!r}"
            )

    @property
    def threads_per_worker(self) -> int | None:
        """The number of compute threads per local worker, or None (PyTorch's default) if there is only one worker."""
        return max(1, available_cpus() // self.workers) if self.workers > 1 else None

    def choose_devices(self, device: str) -> tuple[str, str]:
        """Returns two devices: of the submitting process, which only reads properties of models, and of the workers.

        With an accelerator, `auto` selects a GPU on the workers, so a worker without a GPU fails.
        """
        if self.accelerator is None:
            return device, device
        return "auto", "cuda" if device == "auto" else device

    def limit_decoder_processes(self, loading: LoadingConfig) -> LoadingConfig:
        """Divides the image decoder processes of this machine among its workers, unless their number is configured."""
        if self.threads_per_worker is None or loading.decode.processes is not None:
            return loading
        return replace(loading, decode=replace(loading.decode, processes=self.threads_per_worker))


def run_job(job: ShardJob, label: str, run: RunConfig) -> Totals:
    """Processes the pending shards of a job, shows progress and marks its output datasets as complete.

    Returns:
        The row and failure counts of the first output. With Beam's `--dry_run`, they are the counts before the run.

    Raises:
        FailureRatioError: more images failed than `run` allows. All shards are still written.
    """
    _, options = choose_runner(run)  # checks the options before any dataset is changed
    name = options.view_as(StandardOptions).runner
    if run.progress and name in _IN_PROCESS_RUNNERS - {None, "FnApiRunner"}:
        print(f"{label}: runs on this machine with Beam's FnApiRunner instead of {name}", file=sys.stderr)
    for shards in job.plan():  # first the missing shards, then those that are out of date or have failures to retry
        job.mark_incomplete()
        with show_progress(job, shards, label, run.progress):
            run_pipeline(ProcessShards(job, shards, run.max_failure_ratio, run.accelerator), label, run)
        if options.view_as(TestOptions).dry_run:
            return job.outputs[0].compute_totals()
    return job.finish(run.max_failure_ratio)


def run_pipeline(transform: beam.PTransform[PBegin, Any], label: str, run: RunConfig) -> None:
    """Runs a transform and waits until it finishes. Ctrl-C cancels the job, even on a cluster.

    Raises:
        CaptionlibError: a stage raised this error.
        RunnerError: the runner failed or cannot be reached, or a stage raised a different error.
    """
    runner, options = choose_runner(run)
    pipeline = beam.Pipeline(runner, options)
    _ = pipeline | label >> transform
    try:
        with _stop_workers_on_signals():
            result = pipeline.run()
            try:
                result.wait_until_finish()
            except KeyboardInterrupt:
                result.cancel()
                raise
    except (Exception, grpc.FutureTimeoutError) as error:
        raise _find_cause(error, type(runner).__name__, label) from error


@contextmanager
def _stop_workers_on_signals() -> Iterator[None]:
    """Stops this machine's worker processes on Ctrl-C and SIGTERM. Beam would wait until they finish their shards."""

    def stop(number: int, frame: FrameType | None) -> None:
        _RUN_FILE.unlink(missing_ok=True)
        handler = previous[number]
        if callable(handler):
            handler(number, frame)

    previous: dict[int, Any] = {}
    _RUN_FILE.touch()
    try:
        if threading.current_thread() is threading.main_thread():  # other threads cannot handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.getsignal(number)
                if callable(previous[number]):
                    signal.signal(number, stop)
        yield
    finally:
        _RUN_FILE.unlink(missing_ok=True)
        for signal_number, handler in previous.items():
            signal.signal(signal_number, handler)


def _find_cause(error: BaseException, runner: str, label: str) -> BaseException:
    """Returns the error that made a pipeline fail, without the wrappers and text that Beam adds.

    In this process, Beam raises a copy of the error, whose `__context__` is the original. From other processes, Beam
    receives the error as text.
    """
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    for raised in chain:
        if isinstance(raised, KeyboardInterrupt):
            return KeyboardInterrupt()
        if _is_download_error(raised):
            return RunnerError(
                f"{runner} could not be downloaded: {raised}; expected access to Beam's releases; download the file "
                "elsewhere and pass --flink_job_server_jar, --spark_job_server_jar or --prism_location"
            )
        if isinstance(raised, CaptionlibError | OSError) and not hasattr(raised, _BEAM_COPY_ATTRIBUTE):
            return raised
    text = str(error) or type(error).__name__
    if raised_errors := _RAISED_ERROR.findall(text):
        name, message = raised_errors[-1]
        return cast(CaptionlibError, getattr(errors, name)(message))
    lines = [line for line in text.splitlines() if line.strip()]
    reason = _STEP.sub("", lines[-1] if _TRACEBACK in text else lines[0]).strip()
    return RunnerError(
        f"{runner} did not finish {label}: {reason}; see the runner's logs. Run the same command again to resume; "
        "finished shards are kept"
    )


def _is_download_error(error: BaseException) -> bool:
    return isinstance(error, URLError) or str(error).startswith(("Unable to fetch", "Unable to download"))


def choose_runner(run: RunConfig) -> tuple[PipelineRunner, PipelineOptions]:
    """Creates the runner that Beam's options select; by default FnApiRunner, which runs in this process.

    FnApiRunner also replaces DirectRunner, which would first try to download Prism, a runner written in Go.

    Raises:
        ConfigError: the options are invalid for the runner, or a file of options cannot be read.
    """
    flags = expand_option_files(run.beam_options)
    options = PipelineOptions(flags)
    name = options.view_as(StandardOptions).runner
    if name not in _IN_PROCESS_RUNNERS:
        if run.workers > 1:
            raise ConfigError(
                f"--workers {run.workers} applies to this machine; {name} has its own option, such as --parallelism"
            )
        if run.accelerator is not None:
            _limit_to_one_process(options)
        return create_runner(name), options
    if run.accelerator is not None:
        raise ConfigError("--accelerator applies to workers of a cluster; use --device cuda for a GPU on this machine")
    _reject_unknown_flags(flags)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # run_pipeline raises the errors
    if run.workers == 1:
        return FnApiRunner(), options
    options.view_as(DirectOptions).direct_num_workers = run.workers
    # A terminal sends Ctrl-C to all processes. Workers ignore it, and `exec` makes them children of this process.
    worker = shlex.join([sys.executable, "-m", "pipelines.local_worker", str(_RUN_FILE)])
    command = f"trap '' INT TERM; exec {worker}"
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command)), options


def _limit_to_one_process(options: PipelineOptions) -> None:
    """Limits workers to one process, because several processes would load the models onto the same GPU."""
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    if any(option.startswith("worker_accelerator") for option in services):
        raise ConfigError("--accelerator conflicts with Dataflow's option worker_accelerator; remove one of them")
    options.view_as(DebugOptions).add_experiment("no_use_multiple_sdk_containers")


def _reject_unknown_flags(flags: Sequence[str]) -> None:
    """Rejects flags that Beam does not define."""
    known = PipelineOptions([]).get_all_options().keys()
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0].removeprefix("no_").replace("-", "_")
        if flag.startswith("--") and name not in known:
            raise ConfigError(
                f"{flag} is not an option of Beam's in-process runner; see Beam's list of pipeline options"
            )
