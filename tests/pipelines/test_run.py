import re
from urllib.error import URLError

import apache_beam as beam
import pytest

from captionlib.data.images.decoder_pool import DecoderConfig
from captionlib.data.images.loading import LoadingConfig
from captionlib.errors import ConfigError, RunnerError, StorageError
from pipelines.run import RunConfig, choose_runner, run_pipeline


def test_workers_divide_the_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.run.available_cpus", lambda: 8)
    assert RunConfig(workers=1).limit_decoder_processes(LoadingConfig()).decode.processes is None
    assert RunConfig(workers=4).limit_decoder_processes(LoadingConfig()).decode.processes == 2
    assert RunConfig(workers=20).limit_decoder_processes(LoadingConfig()).decode.processes == 1
    given = LoadingConfig(decode=DecoderConfig(processes=7))
    assert RunConfig(workers=4).limit_decoder_processes(given).decode.processes == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runner=FlinkRunner",), "--workers 2 applies to this machine; FlinkRunner has its own option"),
        (("--no_such_option=1",), "--no_such_option=1 is not an option of Beam's in-process runner"),
    ],
)
def test_invalid_options_are_rejected(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_runner(RunConfig(workers=2, beam_options=options))


@pytest.mark.parametrize(("name", "value"), [("workers", 0), ("max_failure_ratio", 1.5)])
def test_invalid_settings_are_rejected(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: Input should be .*, got {value}"):
        RunConfig(**{name: value})  # type: ignore[arg-type]


def test_unreachable_cluster_raises_runner_error() -> None:
    nowhere = ("--runner=PortableRunner", "--job_endpoint=127.0.0.1:9", "--job_server_timeout=1")
    run = RunConfig(beam_options=(*nowhere, "--environment_type=EXTERNAL", "--environment_config=127.0.0.1:9"))
    with pytest.raises(RunnerError, match=r"PortableRunner did not finish numbers: .*Run the same command again"):
        run_pipeline(beam.Create([1]), "numbers", run)


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to fetch remote job server jar at https://x: timed out"), URLError("no route")]
)
def test_runner_that_cannot_be_downloaded_is_no_reason_to_run_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_: beam.Pipeline) -> None:
        raise error

    monkeypatch.setattr(beam.Pipeline, "run", fail)
    run = RunConfig(beam_options=("--runner=PortableRunner", "--job_endpoint=127.0.0.1:9"))
    with pytest.raises(RunnerError, match=r"could not be downloaded: .*--prism_location") as caught:
        run_pipeline(beam.Create([1]), "numbers", run)
    assert "again" not in str(caught.value)


def _fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [StorageError("disk.parquet: full"), OSError(28, "No space left", "disk.parquet")])
def test_error_of_a_stage_is_raised_as_it_is(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as raised:
        run_pipeline(beam.Create([error]) | beam.Map(_fail), "numbers", RunConfig())
    assert str(raised.value) == str(error)
    assert "Traceback" not in capfd.readouterr().err


def test_interrupt_in_a_stage_is_raised_as_it_is() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(beam.Create([KeyboardInterrupt()]) | beam.Map(_fail), "numbers", RunConfig())


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        ("captionlib.errors.StorageError: a.parquet: full", StorageError("a.parquet: full")),
        ("KeyError: 'x'", RunnerError("FnApiRunner did not finish numbers: KeyError: 'x'; see the runner's logs")),
    ],
)
def test_error_of_a_worker_process_is_read_from_its_stack_trace(
    raised: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = "Traceback (most recent call last):\n  File 'a.py', line 1, in run\n"
    text = f"{trace}{raised}\n\nDuring handling ...:\n\n{trace}{raised} [while running 'numbers/Map-ptransform-1']\n"

    def run(_pipeline: beam.Pipeline) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(beam.Pipeline, "run", run)
    with pytest.raises(type(error), match=f"^{re.escape(str(error))}"):
        run_pipeline(beam.Create([1]), "numbers", RunConfig())


class _Interrupted:
    """A job on a cluster; the user presses Ctrl-C while waiting for it."""

    cancelled = False

    def wait_until_finish(self) -> None:
        raise KeyboardInterrupt

    def cancel(self) -> None:
        self.cancelled = True


def test_ctrl_c_cancels_the_job_on_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _Interrupted()
    monkeypatch.setattr(beam.Pipeline, "run", lambda self: job)
    run = RunConfig(beam_options=("--runner=PortableRunner", "--job_endpoint=127.0.0.1:9"))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(beam.Create([1]), "numbers", run)
    assert job.cancelled
