import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner

from captionlib.data.sources.formats import SOURCE_FORMATS
from captionlib.errors import DatasetError, TrainingInterrupted
from captionlib.evaluation.bootstrap import BootstrapConfig
from captionlib.evaluation.evaluate import TRAIN_SPLITS
from captionlib.evaluation.retrieval import PROTOCOLS
from captionlib.progress import hide_progress, progress_bar
from captionlib.search.duplicates import DEFAULT_THRESHOLD
from captionlib.search.output import OutputFormat
from captionlib.search.sql.session import SqlLimits
from captionlib.serving.config import ServingConfig
from jobs.cli import COMMANDS, captionlib, main

NAMES = [name for commands in COMMANDS.values() for name in commands]
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def call(*arguments: str) -> str | int | None:
    """Runs a command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return exit_.value.code


def test_help_and_usage_errors_import_no_heavy_libraries() -> None:
    heavy = ["torch", "torchvision", "apache_beam", "duckdb", "pyarrow", "numpy", "pydantic"]
    code = f"""
import sys
from click.testing import CliRunner
from jobs.cli import COMMANDS, captionlib

runner = CliRunner()
assert runner.invoke(captionlib, ["--help"]).exit_code == 0
assert runner.invoke(captionlib, [], env={{"_CAPTIONLIB_COMPLETE": "bash_source"}}, prog_name="captionlib").output
for name in [name for commands in COMMANDS.values() for name in commands]:
    assert runner.invoke(captionlib, [name, "--help"]).exit_code == 0, name
    assert runner.invoke(captionlib, [name, "--no-such-option"]).exit_code == 2, name
    completion = {{"_CAPTIONLIB_COMPLETE": "bash_complete", "COMP_WORDS": f"captionlib {{name}} --", "COMP_CWORD": "2"}}
    assert "--help" in runner.invoke(captionlib, [], env=completion, prog_name="captionlib").output, name
    print(name, [module for module in {heavy} if module in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [f"{name} []" for name in NAMES]


def test_choices_and_defaults_equal_those_of_the_library() -> None:
    def get_option(command: str, name: str) -> click.Option:
        with click.Context(captionlib) as context:
            parameters = captionlib.get_command(context, command).params  # type: ignore[union-attr]
        return next(option for option in parameters if isinstance(option, click.Option) and name == option.name)

    def get_choices(command: str, name: str) -> list[str]:
        choice = get_option(command, name).type
        assert isinstance(choice, click.Choice)
        return list(choice.choices)

    assert get_choices("prepare", "source_format") == ["auto", *SOURCE_FORMATS]
    assert get_choices("evaluate", "protocol") == list(PROTOCOLS)
    assert get_choices("query", "output_format") == list(get_args(OutputFormat))
    assert get_option("evaluate", "train_splits").default == TRAIN_SPLITS
    assert get_option("evaluate", "bootstrap_samples").default == BootstrapConfig.samples
    assert get_option("query", "memory").default == SqlLimits.memory
    assert get_option("deduplicate", "threshold").default == DEFAULT_THRESHOLD
    assert get_option("serve", "max_upload").default * 2**20 == ServingConfig.max_upload_bytes


def test_help_lists_all_commands_in_order() -> None:
    text = CliRunner().invoke(captionlib, ["--help"]).output
    positions = [text.index(f"\n  {name} ") for name in NAMES]
    assert positions == sorted(positions)


@pytest.mark.parametrize("name", NAMES)
def test_command_help_has_an_example_and_describes_all_options(name: str) -> None:
    with click.Context(captionlib) as context:
        command = captionlib.get_command(context, name)
    assert command is not None
    text = CliRunner().invoke(captionlib, [name, "--help"]).output
    assert f"captionlib {name}" in text.split("Options:")[0].split("\n", 2)[2], "the help has no example"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} has no help"
            # Click puts two spaces before the defaults that it adds.
            assert re.findall(r" *\[default: ", parameter.help) in ([], ["  [default: "])


def test_reference_documents_all_commands() -> None:
    from docs.reference_pages import render_commands

    headings = re.findall(r"^### captionlib ([a-z-]+)$", render_commands(), re.MULTILINE)
    assert headings == NAMES


def test_commands_in_the_readme_exist() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    used = set(re.findall(r"^captionlib ([a-z-]+)", "".join(blocks), re.MULTILINE))
    assert used
    assert used <= set(NAMES)


def test_error_becomes_a_message_and_an_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "captionlib", "inspect", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert str(tmp_path / "nothing") in result.stderr
    assert "Traceback" not in result.stderr


def test_output_may_name_files_whose_names_are_not_text(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(captionlib, "invoke", lambda _context: click.echo("latin\udce9.jpg"))
    main(["inspect", "x"])
    output.flush()
    assert output.buffer.getvalue() == b"latin\\udce9.jpg\n"  # type: ignore[attr-defined]


def test_unknown_command_and_option_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generat-captions") == 2
    assert "No such command 'generat-captions' (did you mean generate-captions?)." in capsys.readouterr().err
    assert call("inspect", "--unknown") == 2
    assert "No such option" in capsys.readouterr().err


def test_unknown_configuration_key_lists_the_known_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("extract-features", str(tmp_path), "-o", str(tmp_path / "out"), "--set", "encodr.model=vgg16") == 1
    assert "unknown key encodr (did you mean encoder?); known keys: encoder, loading" in capsys.readouterr().err


def test_init_rejects_a_value_instead_of_a_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collection = tmp_path / "collection"
    assert call("init", str(collection), "--source", "images", "-c", "captioner", "--set", "generation=5") == 1
    assert "Error: options: generation: Input should be a valid dictionary, got 5" in capsys.readouterr().err
    assert not collection.exists()


def test_interrupted_training_exits_like_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_arguments: object, **_options: object) -> None:
        error = TrainingInterrupted("stopped after saving the state")
        error.signal_number = signal.SIGTERM
        raise error

    monkeypatch.setattr(captionlib, "main", stop)
    assert call("train-captioner", "features") == 143
    assert capsys.readouterr().err == (
        "Stopped. The last saved state of the training is kept. Run the same command again to resume.\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("extract-features", "Stopped. Finished shards are kept. Run the same command again to resume.\n"),
        ("serve", "Stopped.\n"),
    ],
)
def test_stop_signal_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    command: str,
    message: str,
) -> None:
    def run(_context: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as interrupt:
            raise RuntimeError("Beam wraps the interrupt") from interrupt

    before = signal.getsignal(number)
    monkeypatch.setattr(captionlib, "invoke", run)
    assert call(command, "input") == 128 + number
    assert capsys.readouterr() == ("", message)
    assert signal.getsignal(number) == before


def test_verbose_shows_where_an_error_was_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert call("inspect", str(tmp_path)) == 1
    assert not caplog.records
    assert call("inspect", str(tmp_path), "--verbose") == 1
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert capsys.readouterr().err.count("Error: ") == 2
    CliRunner().invoke(captionlib, ["recipes"])  # not verbose


def test_json_log_has_an_object_per_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", "--log-format", "json", "--unknown") == 2
    assert call("inspect", str(tmp_path), "--log-format=json") == 1
    with progress_bar("label", 3, "items") as bar:
        bar.update(2)
    usage, error, progress_line = map(json.loads, capsys.readouterr().err.splitlines())
    assert (error["level"], usage["level"]) == ("error", "error")
    assert "--unknown" in usage["message"]
    assert {"step": "label", "unit": "items", "count": 2, "total": 3}.items() <= progress_line.items()
    assert call("inspect", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("Error: ")


def test_quiet_hides_progress(capsys: pytest.CaptureFixture[str]) -> None:
    for options, expected in (([], "label: 0 items"), (["--quiet"], "")):
        assert CliRunner().invoke(captionlib, ["recipes", *options]).exit_code == 0
        with progress_bar("label", None, "items"):
            pass
        assert capsys.readouterr().err[: len("label: 0 items")] == expected
    hide_progress(False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetError("two\nlines"), "Error: two lines\n"),
        (OSError(28, "No space left on device", "a.parquet"), "Error: a.parquet: No space left on device\n"),
        (KeyError("x"), "Error: unexpected KeyError: 'x'; --verbose shows where it was raised\n"),
        (MemoryError(), "Error: out of memory; use smaller batches, fewer workers or a machine with more memory\n"),
    ],
)
def test_any_error_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail(_context: object) -> None:
        raise error

    monkeypatch.setattr(captionlib, "invoke", fail)
    assert call("inspect", "x") == 1
    assert capsys.readouterr() == ("", message)


@pytest.mark.skipif(sys.platform != "linux", reason="on_exit is a function of glibc")
@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["no-such-command"], 2)])
def test_the_process_ends_without_the_exit_handlers_of_c_libraries(arguments: list[str], code: int) -> None:
    program = f"""
import ctypes, sys
from jobs.cli import run_program

libc = ctypes.CDLL(None)
libc.on_exit(libc.abort, None)  # as the destructor of a running std::thread does
sys.argv[1:] = {arguments}
run_program()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == code
