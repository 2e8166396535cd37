"""The command line. Each command is a thin layer over the library, in a module that is imported on demand."""

import atexit
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import click

from captionlib import __version__, progress
from captionlib.errors import CaptionlibError, TrainingInterrupted, suggest

__all__ = ["captionlib", "main", "run_program"]

# Groups of commands in workflow order, with the summary of each command for `captionlib --help`.
COMMANDS: dict[str, dict[str, str]] = {
    "Start here": {
        "demo": "Run the whole workflow on synthetic images, in minutes.",
        "recipes": "List the built-in configurations, or print one.",
        "inspect": "Show what a folder contains and how complete it is.",
    },
    "Collections": {
        "init": "Create a collection: images that are captioned and indexed.",
        "update": "Caption and index what has changed in a collection.",
        "remove": "Remove images from a collection or from datasets.",
        "compact": "Merge small shards and split large ones.",
        "status": "Show what is finished, pending and failed in a collection.",
    },
    "Prepare images": {
        "prepare": "List images and their captions in a manifest.",
        "extract-features": "Encode images with a pretrained network.",
        "import-features": "Import the features and captions of NeuralTalk.",
    },
    "Train models": {
        "train-captioner": "Train a captioner, or fine-tune it with its encoder.",
        "train-ranker": "Train a ranker (dual encoder) for image-text retrieval.",
        "train-language-model": "Train a language model on captions or any text.",
        "build-datastore": "Store captions for nearest-neighbor reranking.",
        "export-checkpoint": "Copy a checkpoint to a folder that others can load.",
    },
    "Generate captions": {
        "generate-captions": "Caption every image of a manifest or features dataset.",
        "caption": "Caption single images and print the result.",
        "embed": "Embed every image with a ranker.",
        "sample": "Print text that a language model generates.",
        "export": "Export images and captions for other programs.",
    },
    "Evaluate": {
        "evaluate": "Score captions (BLEU, CIDEr, ...) or a ranker.",
        "report": "Write a web page of images, captions and scores.",
        "activations": "Write a web page of a network's activations.",
    },
    "Search": {
        "deduplicate": "Group copies and near-duplicates of images.",
        "build-index": "Index captions and embeddings for search.",
        "query": "Search by words, meaning, image or SQL.",
        "serve": "Serve an index as a web application and JSON API.",
    },
}

# Messages about what is kept when a resumable command is stopped, and the commands that show each message.
_KEPT = {
    "Finished stages are kept": {"demo", "update", "remove"},
    "Finished datasets are kept": {"compact"},
    "Finished shards are kept": {
        *("prepare", "extract-features", "import-features", "generate-captions", "embed", "build-index", "export"),
    },
    "The last saved state of the training is kept": {"train-captioner", "train-ranker", "train-language-model"},
}
_LOGGER = logging.getLogger("captionlib")


def _set_verbose(verbose: bool) -> None:
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(_LogFormatter("%(name)s: %(message)s"))
        logging.basicConfig(handlers=[handler])
    _LOGGER.setLevel(logging.DEBUG if verbose else logging.NOTSET)


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return progress.format_message(record.levelname.lower(), super().format(record))


def _output_option(*names: str, apply: Callable[[Any], None], **attributes: Any) -> click.Option:
    """Returns an option whose value is passed to `apply` instead of the command."""
    return click.Option(names, expose_value=False, callback=lambda _context, _option, value: apply(value), **attributes)


_OUTPUT_OPTIONS = [
    _output_option("-q", "--quiet", is_flag=True, apply=progress.hide_progress, help="Hide progress bars."),
    _output_option("-v", "--verbose", is_flag=True, apply=_set_verbose, help="Show where an error was raised."),
    _output_option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        is_eager=True,
        apply=progress.set_log_format,
        help="Format of progress and errors on standard error; json prints an object per line.",
    ),
]


class LazyGroup(click.Group):
    """Lists the commands in `COMMANDS`, and imports the module of a command on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in COMMANDS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"jobs.{cmd_name.replace('-', '_')}").command
        command.name = cmd_name
        command.params = [*(option for option in command.params if option not in _OUTPUT_OPTIONS), *_OUTPUT_OPTIONS]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}{suggest(args[0], names)}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise click.Abort from interrupt  # for KeyboardInterrupt, click prints an empty line

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, commands in COMMANDS.items():
            with formatter.section(group):
                formatter.write_dl([(f"{name:<20}", summary) for name, summary in commands.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="`captionlib COMMAND --help` explains a command, with examples.",
)
@click.version_option(__version__, prog_name="captionlib")
def captionlib() -> None:
    """Caption millions of images, and search them.

    Each stage reads folders and writes a folder of Parquet shards. A folder is a path or a URI such as
    s3://bucket/captions. To resume an interrupted stage, run the same command again.

    \b
    From a folder of images to a search page:
      captionlib init holidays --source images/ -c hf:Salesforce/blip-image-captioning-large@main --serve

    \b
    From images with reference captions to a captioner of your own:
      captionlib prepare dataset.json --output manifest
      captionlib extract-features manifest --output features
      captionlib train-captioner features --output captioner
      captionlib generate-captions features --checkpoint captioner --output captions
      captionlib evaluate captions --manifest manifest --split test
      captionlib build-index captions --output index
      captionlib serve index
    """


def run_program() -> NoReturn:
    """Runs the command line and ends the process, for the script `captionlib` and `python -m captionlib`.

    The process ends without running the destructors of C++ libraries. Arrow's destructors can abort the process
    if threads have just been started, even after the command has succeeded.
    """
    exit_code = 0
    # Exit functions that libraries register later run before this one.
    atexit.register(lambda: _end_process(exit_code))
    try:
        main()
    except SystemExit as exit_:
        exit_code = exit_.code if isinstance(exit_.code, int) else 0
    sys.exit(exit_code)


def _end_process(exit_code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader of the output has closed the pipe
            exit_code = exit_code or 1
    os._exit(exit_code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Converts errors and stop signals into one line and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names can contain invalid UTF-8
    progress.set_log_format("json" if _selects_json(arguments) else "text")  # applies to usage errors too
    signals: list[int] = []
    previous = _catch_stop_signals(signals)
    try:
        color = False if os.environ.get("NO_COLOR") else None  # if None, click uses color on terminals
        captionlib.main(arguments, prog_name="captionlib", standalone_mode=False, color=color)
    except SystemExit:
        raise
    except BaseException as error:
        if signals or isinstance(error, TrainingInterrupted | KeyboardInterrupt | click.Abort):
            number = error.signal_number if isinstance(error, TrainingInterrupted) else [*signals, signal.SIGINT][0]
            click.echo(progress.format_message("warning", _describe_stop(arguments)), err=True)
            sys.exit(128 + number)
        _LOGGER.debug("the error was raised here:", exc_info=True)
        if isinstance(error, click.ClickException):
            _show_usage_error(error)
            sys.exit(error.exit_code)
        if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        click.echo(progress.format_message("error", f"Error: {_describe_error(error)}"), err=True)
        sys.exit(1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _catch_stop_signals(received: list[int]) -> dict[int, Any]:
    """Handles Ctrl-C and SIGTERM: adds the signal to `received` and raises KeyboardInterrupt.

    Returns the previous handlers.
    """

    def stop(number: int, _frame: object) -> None:
        if not received:  # threads and destructors that the interrupt stops must not print stack traces
            sys.unraisablehook = lambda _: None
            threading.excepthook = lambda _: None
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}


def _selects_json(arguments: Sequence[str]) -> bool:
    return "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments)


def _show_usage_error(error: click.ClickException) -> None:
    """Prints an error in the arguments. In the text format, the usage of the command is also printed."""
    message = progress.format_message("error", f"Error: {error.format_message()}")
    if message.startswith("{"):
        click.echo(message, err=True)
    else:
        error.show()


def _describe_stop(arguments: Sequence[str]) -> str:
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    kept = next((kept for kept, commands in _KEPT.items() if command in commands), None)
    return "Stopped." if kept is None else f"Stopped. {kept}. Run the same command again to resume."


def _describe_error(error: BaseException) -> str:
    """Describes an error in one line. For an unexpected error, the line contains the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, CaptionlibError):
        return " ".join(lines)
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename is not None else ""
        return f"{name}{error.strerror or ' '.join(lines) or type(error).__name__}"
    if isinstance(error, MemoryError):
        return "out of memory; use smaller batches, fewer workers or a machine with more memory"
    message = lines[0] if lines else "no message"
    return f"unexpected {type(error).__name__}: {message}; --verbose shows where it was raised"
