"""Command-line options that several commands share."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import click

from captionlib.recipes import find_recipe

__all__ = [
    "beam_argument",
    "captioner_option",
    "config_options",
    "device_option",
    "limit_option",
    "pipeline_options",
    "progress_option",
    "serve_option",
    "serve_when_done",
    "training_options",
    "weights_option",
    "workers_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])

# Commands that use the recipes (built-in YAML files) of another command.
_RECIPE_COMMANDS = dict.fromkeys(["caption", "query", "serve"], "generate-captions")

device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N; auto uses a GPU if available."
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Process only N evenly spaced images, and estimate the time and output size for the others.",
)
progress_option = click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
weights_option = click.option("--weights", metavar="FILE", help="Weights file of the encoder, if it needs one.")
workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Worker processes on this machine."
)
beam_argument = click.argument("beam_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- BEAM OPTIONS]")


_PRETRAINED = "hf:Salesforce/blip-image-captioning-large@main"
_NO_CAPTIONER = """{command} needs a captioner, -c FOLDER. To get one, run one of these:
  pip install 'captionlib[transformers]' && captionlib {example} -c {pretrained}  # BLIP, 1.9 GB
  captionlib demo -o demo && captionlib {example} -c demo/captioner  # takes minutes; for synthetic images only"""


class _NoCaptionerError(click.ClickException):
    exit_code = 2  # as for all usage errors


def captioner_option(name: str, *, example_arguments: str, help_text: str) -> Callable[[Command], Command]:
    """Returns the required option `-c`. If it is missing, the error says how to get a captioner.

    `example_arguments` is the command line in the error, without `-c`. Parameters are in braces, as in
    `caption {images}`.
    """

    def require(context: click.Context, _parameter: click.Parameter, address: str | None) -> str | None:
        if address is not None or context.resilient_parsing:
            return address
        values = {key: value if isinstance(value, str) else value[0] for key, value in context.params.items() if value}
        arguments = example_arguments.format(**{key: shlex.quote(value) for key, value in values.items()})
        message = _NO_CAPTIONER.format(command=context.info_name, example=arguments, pretrained=_PRETRAINED)
        raise _NoCaptionerError(message)

    return click.option(name, "-c", metavar="FOLDER", callback=require, help=f"{help_text}  [required]")


serve_option = click.option(
    "--serve",
    metavar="[PORT]",
    is_flag=False,
    flag_value=8000,
    type=click.IntRange(1, 65535),
    help="When done, serve the search page, on port 8000 unless PORT is specified.",
)


def serve_when_done(folder: str, port: int | None, *commands: str) -> None:
    """If `port` is not None, runs `commands` on a folder, and then serves the folder."""
    if port is None:
        return
    root = click.get_current_context().find_root()
    group = cast(click.Group, root.command)
    for name, *options in (*((name,) for name in commands), ("serve", "--port", str(port))):
        command = group.get_command(root, name)
        assert command is not None
        with command.make_context(name, [folder, *options], parent=root) as context:
            command.invoke(context)


def config_options(command: Command) -> Command:
    options = [
        click.option(
            "--config",
            metavar="RECIPE|FILE",
            callback=_find_recipe,
            help="Recipe (built-in configuration) or YAML file that overrides defaults. See `captionlib recipes`.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set the value of a configuration key. Repeatable.",
        ),
    ]
    return _apply(command, options)


def _find_recipe(context: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    if name is None:
        return None
    command = context.info_name or ""
    return str(find_recipe(name, _RECIPE_COMMANDS.get(command, command)))


def training_options(command: Command) -> Command:
    help_text = "Folder for the checkpoint, metrics, curves and training state."
    options = [
        click.option("--output", "-o", required=True, metavar="FOLDER", help=help_text),
        config_options,
        device_option,
        click.option("--overwrite", is_flag=True, help="Delete an earlier run in the folder and start again."),
        progress_option,
    ]
    return _apply(command, options)


def pipeline_options(command: Command) -> Command:
    """Adds the options that all pipelines share. The command receives them as `run`, a `RunConfig`.

    Beam's own options follow `--`.
    """

    @functools.wraps(command)
    def with_run_config(**options: Any) -> Any:
        from pipelines.run import RunConfig

        run = RunConfig(**{field.name: options.pop(field.name) for field in dataclasses.fields(RunConfig)})
        return command(run=run, **options)

    options = [
        workers_option,
        click.option("--overwrite", is_flag=True, help="Replace an output that has a different configuration."),
        click.option("--verify", is_flag=True, help="Verify finished shards, and process damaged ones again."),
        click.option("--retry-failures", is_flag=True, help="Process failed images of finished shards again."),
        click.option(
            "--max-failure-ratio",
            type=click.FloatRange(0, 1),
            help="Fail if the fraction of failed images is larger than this. All other images are still written.  "
            "[default: fail only if all images failed]",
        ),
        progress_option,
        click.option(
            "--accelerator",
            metavar="SPEC",
            help="GPU of each Dataflow worker, such as 'type:nvidia-l4;count:1;install-nvidia-driver'. A worker "
            "without a GPU fails. Each worker runs one process, which works on two shards at a time.",
        ),
        beam_argument,
    ]
    return _apply(cast(Command, with_run_config), options)


def _apply(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
